"""The llama engine: models in GGUF files, computed by llama.cpp in this process."""

from meshserve.engines.llama.runner import LlamaEngine

__all__ = ["LlamaEngine"]
