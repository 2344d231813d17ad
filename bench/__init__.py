"""Benchmarks: `python -m bench.NAME [--json]`, each against its floor in the same run."""
