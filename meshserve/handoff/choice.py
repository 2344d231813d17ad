"""Where a prompt is prefilled: a decode worker's own figures and the router's, put before the rule
:func:`meshserve.routing.policies.decide_handoff`.
"""

from meshserve.config import HandoffConfig
from meshserve.engines.protocol import Engine, EngineLoad
from meshserve.handoff.requester import PrefillRequester
from meshserve.routing.policies import ALIKE_MS, NO_PEER, QUEUE_FULL, UNMEASURED_LOCAL_TOKENS, decide_handoff
from meshserve.wire.generation import GenerateRequest, HandoffDecision

_FLOOR, _SHORT = HandoffDecision(False, "floor"), HandoffDecision(False, "short")


class HandoffChoice:
    """Decides for each prompt of one decode worker."""

    def __init__(self, engine: Engine, requester: PrefillRequester, config: HandoffConfig) -> None:
        self._engine, self._requester, self._config = engine, requester, config

    def choose(self, request: GenerateRequest) -> tuple[HandoffDecision | None, list[str]]:
        """What is decided, and the prefill workers to hand over to, best first: none if the prompt is computed here.

        The decision is None where no router named a prefill worker and the prompt is short: there was nothing to decide. The prompt's last
        token is always computed here.
        """
        num_to_compute, floor = len(request.tokens) - 1, self._config.max_local_prefill_tokens
        if not request.prefill_ms and num_to_compute <= (UNMEASURED_LOCAL_TOKENS if floor is None else floor):
            return None, []
        if floor is not None and num_to_compute <= floor:
            return _FLOOR, []
        there_ms, is_short = self._requester.peers.ready_ms(request), floor is None and num_to_compute <= UNMEASURED_LOCAL_TOKENS
        if is_short and not there_ms:
            return _SHORT, []
        load = self._engine.load()
        if is_short and self._is_done_soon(num_to_compute, load):
            return _SHORT, []
        num_uncached = num_to_compute - self._engine.num_cached_tokens(request)
        local_ms, remote_ms = self._expected_ms(num_uncached, load, there_ms)
        is_handoff, reason = decide_handoff(num_uncached, floor, local_ms, remote_ms, load.num_running > 0)
        candidates: list[str] = []
        if is_handoff:
            candidates = self._requester.peers.candidates(request)
            if not candidates or self._is_queue_full(candidates[0], request):
                is_handoff, reason = QUEUE_FULL if candidates else NO_PEER
                candidates = []
        elif reason == "faster-here":
            self._requester.rates.kept_here()
        return HandoffDecision(is_handoff, reason, local_ms, remote_ms), candidates

    def _is_queue_full(self, peer: str, request: GenerateRequest) -> bool:
        num_queued = self._requester.peers.num_queued(peer, request, self._requester.num_outstanding)
        return num_queued >= self._config.max_prefill_queue

    def _is_done_soon(self, num_tokens: int, load: EngineLoad) -> bool:
        """Whether so many tokens, all uncached, are computed here before a handoff could gain anything that counts.

        Then nothing more is looked up: on engines this fast, the rest of the decision costs more than it may.
        """
        local_s = self._engine.rates.prefill_s(load.waiting_prefill_tokens + num_tokens, load.num_running)
        return local_s is not None and local_s * 1000 < ALIKE_MS

    def _expected_ms(self, num_tokens: int, load: EngineLoad, there_ms: float) -> tuple[float | None, float | None]:
        """Until the first token here, and with a handoff where the KV is computed `there_ms` from now.

        With sequences running, a step of theirs comes after a handoff: the prompt's last token is computed in it.
        """
        rates, num_running = self._engine.rates, load.num_running
        local_s = rates.prefill_s(load.waiting_prefill_tokens + num_tokens, num_running)
        remote_ms = None
        if there_ms:
            step_s = rates.decode_s() if num_running else 0.0
            remote_ms = there_ms + (self._requester.rates.handoff_s(num_tokens) + step_s) * 1000
        return None if local_s is None else local_s * 1000, remote_ms
