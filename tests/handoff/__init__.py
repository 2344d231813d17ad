"""Tests of the handoff floor."""
