"""Short prompts that go with their tickets, and come back with their claims: what the decode worker does differently for them."""

import asyncio

from meshserve.config import HandoffConfig
from meshserve.engines.protocol import Engine
from meshserve.mesh.calls import IncomingCall
from meshserve.wire.generation import GenerateRequest
from meshserve.wire.handoff import Offer

_MAX_TOKENS = 2048
"""In one offer: tickets are small notes."""
_ROUNDS = 2
"""Of a worker's slots that may be offered: what is short waits for one round only, and comes back sooner than a claim would be answered."""
_ANSWER_S = 0.004
"""Until a claim that brought its blocks is told that they were taken. Nothing waits for it, and a message holds many such answers: one
for each prompt cost both sides a wake-up of two threads."""


class Offers:
    """Which prompts are offered, and their numbers."""

    def __init__(self, engine: Engine, config: HandoffConfig) -> None:
        self._engine, self._config = engine, config
        self._num_made = 0

    def first_block(self, request: GenerateRequest, num_outstanding: int) -> int | None:
        """Of a prompt that may be offered, the first block that is missing here; else None.

        It has little KV to compute, and so few are outstanding that it is begun before its offer is too old.
        """
        num_tokens, layout = len(request.tokens) - 1, self._engine.kv_layout
        if num_tokens > _MAX_TOKENS or num_outstanding >= _ROUNDS * self._config.prefill_slots:
            return None
        num_cached = self._engine.num_cached_tokens(request)
        is_short = 0 < (num_tokens - num_cached) * layout.bytes_per_token <= self._config.offer_kv_bytes
        return num_cached // layout.block_size if is_short else None

    def make(self, request: GenerateRequest, first_block: int | None) -> Offer:
        """The next one."""
        assert first_block is not None, "only what may be offered is"
        self._num_made += 1
        return Offer(self._num_made, first_block, request.tokens[:-1])


class LateAnswers:
    """Claims that are complete, and are told so together."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._claims: list[IncomingCall] = []
        self._timer: asyncio.TimerHandle | None = None

    def end_soon(self, claim: IncomingCall) -> None:
        """Within a few milliseconds."""
        self._claims.append(claim)
        if self._timer is None:
            self._timer = self._loop.call_later(_ANSWER_S, self._end_all)

    def _end_all(self) -> None:
        self._timer = None
        claims, self._claims = self._claims, []
        for claim in claims:
            claim.end()

    def close(self) -> None:
        """End them now."""
        if self._timer is not None:
            self._timer.cancel()
        self._end_all()
