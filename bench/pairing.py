"""Paired comparison, as `meshserve bench --compare` does it."""

from meshserve.cli.bench.pairing import Ratio, ratio_of

__all__ = ["Ratio", "ratio_of"]
