"""The prefill role: computes prompts' KV for decode workers. All it does is the handoff's; here it is joined to a peer."""

from meshserve.handoff.provider import PrefillProvider
from meshserve.observe.worker_report import WorkerReporter


class PrefillRole:
    """Pulls tickets for this peer's engine, and has its load reported."""

    def __init__(self, provider: PrefillProvider, reporter: WorkerReporter) -> None:
        self._provider = provider
        provider.subscribe(reporter.changed)

    @property
    def num_under_way(self) -> int:
        """Prompts that were claimed and are not finished."""
        return len(self._provider.queue.jobs)

    def drain(self) -> None:
        """Claim no more."""
        self._provider.stop_claiming()
