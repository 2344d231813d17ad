"""Where a prompt is prefilled: a decode worker's own figures and the router's, put before :func:`meshserve.routing.handoff.decide`."""

from meshserve.config import HandoffConfig
from meshserve.engines.protocol import Engine
from meshserve.handoff.requester import PrefillRequester
from meshserve.routing.handoff import NO_PEER, QUEUE_FULL, UNMEASURED_LOCAL_TOKENS, decide
from meshserve.wire.account import HandoffDecision
from meshserve.wire.generation import GenerateRequest

_FLOOR = HandoffDecision(False, "floor")


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
        num_uncached = num_to_compute - self._engine.num_cached_tokens(request)
        local_ms, remote_ms, is_busy = self._expected_ms(request, num_uncached)
        is_handoff, reason = decide(num_uncached, floor, local_ms, remote_ms, is_busy)
        candidates: list[str] = []
        if is_handoff:
            candidates = self._requester.candidates(request)
            if not candidates or self._requester.is_queue_full(candidates[0], request):
                is_handoff, reason = QUEUE_FULL if candidates else NO_PEER
                candidates = []
        elif reason == "faster-here":
            self._engine.rates.kept_here()
        return HandoffDecision(is_handoff, reason, local_ms, remote_ms), candidates

    def _expected_ms(self, request: GenerateRequest, num_tokens: int) -> tuple[float | None, float | None, bool]:
        """Until the first token, here and at the best prefill worker that is not this one; and whether sequences run here.

        With sequences running, a step of theirs comes after a handoff: the prompt's last token is computed in it.
        """
        load, rates = self._engine.load(), self._engine.rates
        num_running = load.num_running
        step_s = rates.decode_s() if num_running else 0.0
        local_s = rates.prefill_s(load.waiting_prefill_tokens + num_tokens, num_running)
        there_ms = self._requester.expected_ms(request)
        remote_ms = there_ms + (rates.handoff_s(num_tokens) + step_s) * 1000 if there_ms else None
        return None if local_s is None else local_s * 1000, remote_ms, num_running > 0
