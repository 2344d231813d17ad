"""The llama engine: what all engines have in common, over a model of llama.cpp."""

from meshserve.engines.claims import Claim, Share
from meshserve.engines.core.engine import CoreEngine
from meshserve.engines.llama.options import describe, parse_options
from meshserve.engines.llama.runner import LlamaRunner
from meshserve.engines.protocol import EngineOptions


class LlamaEngine(CoreEngine):
    """A GGUF file, computed by llama.cpp in this process. Raises UsageError for options, StartupFailed for a file that will not do."""

    def __init__(self, options: EngineOptions) -> None:
        self._claim = Claim()
        self._options = parse_options(options, self._claim)
        super().__init__(LlamaRunner(self._options))

    async def start(self) -> None:
        """As :class:`CoreEngine`. What was claimed is claimed again, as after a failure or :meth:`close` nothing is held."""
        options = self._options
        pending = Share(options.kv_cache_bytes, options.num_threads)
        self._claim.update(pending)
        await super().start()
        self._claim.update(pending._replace(pending_bytes=0))
        self.description = describe(options, self.card.model, self.kv_layout.refusal)

    async def close(self) -> None:
        """As :class:`CoreEngine`; what was claimed is left to others."""
        await super().close()
        self._claim.update(None)
