"""The dummy engine: what all engines have in common, over the dummy model."""

import time
from collections.abc import Callable

from meshserve.engines.core.engine import CoreEngine
from meshserve.engines.dummy.options import parse_options
from meshserve.engines.dummy.runner import DummyRunner
from meshserve.engines.protocol import EngineOptions


class DummyEngine(CoreEngine):
    """Real KV bytes, tokens that depend on their contents, the timing of a profile; no model.

    `clock` gives monotonic seconds. Raises UsageError for options that it does not know.
    """

    def __init__(self, options: EngineOptions, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(DummyRunner(parse_options(options), options.model or "dummy", clock), clock)
