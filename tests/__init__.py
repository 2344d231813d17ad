"""Tests of meshserve."""
