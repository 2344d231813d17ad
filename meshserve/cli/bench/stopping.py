"""Ctrl-C while figures are gathered ends the load and not the command: what was seen until then is worth more than nothing."""

import asyncio
import signal
from typing import Self

from meshserve.cli.bench.load import Load

EXIT_CODE = 128 + signal.SIGINT


class Stop:
    """Whether the user has had enough. A second Ctrl-C ends the command as it always does."""

    def __init__(self) -> None:
        self._load: Load | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_asked = False

    def watch(self, load: Load) -> None:
        """Stop this run when asked; at once, if that was before."""
        self._load = load
        if self.is_asked:
            load.stop()

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._loop.add_signal_handler(signal.SIGINT, self._asked)
        return self

    def _asked(self) -> None:
        self.is_asked = True
        self._leave()
        if self._load is not None:
            self._load.stop()

    def _leave(self) -> None:
        if self._loop is not None:
            self._loop.remove_signal_handler(signal.SIGINT)  # and Python's own, KeyboardInterrupt, is back
            self._loop = None

    def __exit__(self, *error: object) -> None:
        self._leave()
