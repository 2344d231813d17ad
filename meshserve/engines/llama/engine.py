"""The llama engine: what all engines have in common, over a model of llama.cpp."""

from meshserve.engines.core.engine import CoreEngine
from meshserve.engines.llama.options import parse_options
from meshserve.engines.llama.runner import LlamaRunner
from meshserve.engines.protocol import EngineOptions


class LlamaEngine(CoreEngine):
    """A GGUF file, computed by llama.cpp in this process. Raises UsageError for options, StartupFailed for a file that will not do."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(LlamaRunner(parse_options(options)))
