"""Disaggregated LLM serving as a zero-broker peer mesh."""

__version__ = "0.1.0"
