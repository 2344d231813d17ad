"""An engine that needs no model: real KV bytes, tokens that depend on them, and the timing of a real one."""

from meshserve.engines.dummy.runner import DummyEngine

__all__ = ["DummyEngine"]
