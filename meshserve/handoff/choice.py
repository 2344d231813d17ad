"""Where a prompt is prefilled: the decode worker's own figures and the router's, for the rule
:func:`meshserve.routing.policies.decide_handoff`.
"""

import logging
from collections.abc import Sized

from meshserve.config import HandoffConfig
from meshserve.engines.fitting import Line
from meshserve.engines.protocol import Engine, EngineLoad
from meshserve.mesh.mesh import Mesh
from meshserve.routing.policies import ALIKE_MS, NO_PEER, QUEUE_FULL, UNMEASURED_LOCAL_TOKENS, decide_handoff
from meshserve.wire.generation import GenerateRequest, HandoffDecision
from meshserve.wire.hello import PeerInfo

_log = logging.getLogger(__name__)

_FLOOR, _SHORT = HandoffDecision(False, "floor"), HandoffDecision(False, "short")

_MEMORY_HANDOFFS = 20.0
"""Handoffs after which one counts for a third: the network's load changes soon."""
_ENOUGH_HANDOFFS = 3
_MOST_ABOVE = 2.0
"""A handoff that took longer than this times the expected time counts as this: one stalled connection must not
end all handoffs."""
_FADE = 0.98
"""Factor of the expected time for each prompt that stays here because of it: without handoffs nobody measures
whether the network is still slow. Higher tries again later, lower tries more often in vain."""


class HandoffRates:
    """The time that the handoff of KV adds to its computation elsewhere, as one decode worker measures it."""

    def __init__(self) -> None:
        self._line, self._num_handoffs, self._faded = Line(_MEMORY_HANDOFFS), 0, 1.0
        self._mean_s_per_token = 0.0

    def handed_over(self, num_tokens: int, duration_s: float) -> None:
        """The KV of `num_tokens` came from another worker."""
        if num_tokens <= 0:
            return
        mean_s, now_s = self._mean_s_per_token, duration_s / num_tokens
        self._mean_s_per_token = mean_s + (now_s - mean_s) * 0.1 if mean_s else now_s
        self._num_handoffs += 1
        if self._num_handoffs == 1:  # the first waited for connections to open, and says nothing
            return
        if self._num_handoffs > _ENOUGH_HANDOFFS:
            duration_s = min(duration_s, _MOST_ABOVE * self.handoff_s(num_tokens))
        self._line.add(num_tokens, duration_s)
        self._faded = 1.0

    def kept_here(self) -> None:
        """A prompt was not handed over, because of :meth:`handoff_s` among others."""
        self._faded *= _FADE

    def handoff_s(self, num_tokens: int) -> float:
        """Expected time that the handoff of so many tokens adds; 0 until it was measured, so that it will be."""
        base_s, s_per_token = self._line.fit()
        return (base_s + s_per_token * num_tokens) * self._faded

    def ns_per_token(self) -> int:
        """The mean of the last twenty or so, for routers; 0 until there was one."""
        return round(self._mean_s_per_token * 1e9)


class HandoffChoice:
    """Decides for each prompt of one decode worker. `outstanding` are its prompts that wait or are computed
    elsewhere now."""

    def __init__(self, mesh: Mesh, engine: Engine, config: HandoffConfig, outstanding: Sized) -> None:
        self._mesh, self._engine, self._config = mesh, engine, config
        self._outstanding = outstanding
        self.rates = HandoffRates()

    # --- here, or elsewhere

    def choose(self, request: GenerateRequest) -> tuple[HandoffDecision | None, list[str]]:
        """The decision, and the prefill workers to hand over to, best first; none if the prompt is computed here.

        The decision is None where no router named a prefill worker and the prompt is short.
        """
        # the prompt's last token is always computed here
        num_to_compute, floor = len(request.tokens) - 1, self._config.max_local_prefill_tokens
        if not request.prefill_ms and num_to_compute <= (UNMEASURED_LOCAL_TOKENS if floor is None else floor):
            return None, []
        if floor is not None and num_to_compute <= floor:
            return _FLOOR, []
        there_ms = self._ready_ms(request)
        is_short = floor is None and num_to_compute <= UNMEASURED_LOCAL_TOKENS
        if is_short and not there_ms:
            return _SHORT, []
        load = self._engine.load()
        # in order of cost: lookups in the pool and among the peers only for prompts that may be handed over
        if is_short and self._is_done_soon(num_to_compute, load):
            return _SHORT, []
        num_uncached = num_to_compute - self._engine.num_cached_tokens(request)
        local_ms, remote_ms = self._expected_ms(num_uncached, load, there_ms)
        is_handoff, reason = decide_handoff(num_uncached, floor, local_ms, remote_ms, load.num_running > 0)
        candidates: list[str] = []
        if is_handoff:
            candidates = self.candidates(request)
            most = self._config.max_prefill_queue
            if not candidates or self._num_queued(candidates[0], request) >= most:
                # the rule says handoff, but no worker can take the prompt soon
                is_handoff, reason = QUEUE_FULL if candidates else NO_PEER
                candidates = []
        elif reason == "faster-here":
            self.rates.kept_here()
        return HandoffDecision(is_handoff, reason, local_ms, remote_ms), candidates

    def _is_done_soon(self, num_tokens: int, load: EngineLoad) -> bool:
        """Whether so many uncached tokens are computed here before a handoff could gain anything that counts:
        on engines this fast, the rest of the decision costs more than it may."""
        local_s = self._engine.rates.prefill_s(load.waiting_prefill_tokens + num_tokens, load.num_running)
        return local_s is not None and local_s * 1000 < ALIKE_MS

    def _expected_ms(self, num_tokens: int, load: EngineLoad, there_ms: float) -> tuple[float | None, float | None]:
        """Until the first token here, and with a handoff where the KV is computed `there_ms` from now."""
        rates, num_running = self._engine.rates, load.num_running
        local_s = rates.prefill_s(load.waiting_prefill_tokens + num_tokens, num_running)
        remote_ms = None
        if there_ms:
            # the prompt's last token is computed in a step of the sequences that run here
            step_s = rates.decode_s() if num_running else 0.0
            remote_ms = there_ms + (self.rates.handoff_s(num_tokens) + step_s) * 1000
        return None if local_s is None else local_s * 1000, remote_ms

    # --- prefill peers

    def _ready_ms(self, request: GenerateRequest) -> float:
        """Until the best prefill peer that the router named has computed the KV; 0 if the router did not say."""
        for (peer, _, _), ready_ms in zip(request.prefill_peers, request.prefill_ms, strict=False):
            if peer != self._mesh.incarnation and self._mesh.reaches_us(peer):
                return ready_ms
        return 0.0

    def candidates(self, request: GenerateRequest) -> list[str]:
        """Prefill peers that could take this prompt, as the router ranked them, then others."""
        own, layout = self._mesh.incarnation, self._engine.kv_layout
        able = [
            info.incarnation
            for info in self._mesh.peers_with("prefill")
            # one that cannot dial this worker would never claim the task, which would wait for it in vain
            if layout.accepts(info.layout) and info.incarnation != own and self._mesh.reaches_us(info.incarnation)
        ]
        ranked = [peer for peer, _, _ in request.prefill_peers if peer in able]
        return ranked + [peer for peer in able if peer not in ranked]

    def _num_queued(self, peer: str, request: GenerateRequest) -> int:
        """Prompts ahead of this one: those that the router heard of, and this worker's own."""
        queued_there = [queued for ranked, queued, _ in request.prefill_peers if ranked == peer]
        return sum(queued_there) + len(self._outstanding)

    def num_preferred(self, candidates: list[str], request: GenerateRequest) -> int:
        """How many peers are asked at first: the best if a router knows it to be idle; else all that hold
        as much of the prompt, of which the first that is free gets it.
        """
        # one busy peer alone cost the hedge time in one of ten prompts at 80 % load (measured)
        overlaps = {peer: overlap_blocks for peer, _, overlap_blocks in request.prefill_peers}
        best = candidates[0]
        if best in overlaps and not self._num_queued(best, request):
            return 1
        have = overlaps.get(best, 0)
        unlike = (rank for rank, peer in enumerate(candidates) if overlaps.get(peer, 0) != have)
        return next(unlike, len(candidates))

    def say_if_unlike(self, info: PeerInfo) -> None:
        """Warn of a prefill worker of the same model whose KV layout differs: no prompt can be handed over."""
        own, other, card = self._engine.kv_layout, info.layout, self._engine.card
        if info.card is None or info.card.model_hash != card.model_hash or other is None:
            return
        if own.can_hand_over and other.can_hand_over and not own.accepts(other):
            text = "%s keeps its KV in another way: no prompt is handed over to it; give both the same --kv-type and version"
            _log.warning(text, info.name)
