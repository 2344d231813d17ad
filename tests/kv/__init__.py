"""Tests of kv."""
