"""Tests of the harness itself: its hosts and faults are real, so they are tested like anything else."""
