"""Tests of the mesh floor."""
