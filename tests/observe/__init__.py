"""Tests of the observe floor."""
