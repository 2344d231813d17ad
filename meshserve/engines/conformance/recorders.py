"""Sinks that remember what an engine told them, and what it told them that the protocol forbids."""

import asyncio
from collections.abc import Callable

from meshserve.engines.protocol import GenerationStats, KVBlock
from meshserve.errors import MeshserveError
from meshserve.wire.generation import GenerateRequest, TokenLogprobs


def demand(is_kept: object, rule: str) -> None:
    """Raises AssertionError, which names the rule, if it is broken."""
    if not is_kept:
        raise AssertionError(rule)


class Recorder:
    """What both kinds of sinks share. A broken rule is kept until :meth:`check`: what a sink raises is the engine's to handle."""

    def __init__(self, request_id: str, deadline_s: float, on_call: Callable[[], None] | None) -> None:
        self.request_id = request_id
        self.error: MeshserveError | None = None
        self._deadline_s, self._on_call = deadline_s, on_call
        self._has_ended = False
        self._silent_since = ""
        self._broken: list[str] = []
        self._called = asyncio.Event()

    def silence(self, reason: str) -> None:
        """From now on every call is one too many."""
        self._silent_since = self._silent_since or reason

    @property
    def is_over(self) -> bool:
        """It ended, or nothing is expected any more."""
        return self._has_ended or bool(self._silent_since)

    def check(self) -> None:
        """Raises AssertionError for the first rule that was broken."""
        if self._broken:
            raise AssertionError(f"{self.request_id}: {self._broken[0]}")

    def on_error(self, error: MeshserveError) -> None:
        """The end."""
        self.error = error
        self._note(isinstance(error, MeshserveError), "errors are MeshserveErrors", is_end=True)

    def _note(self, is_kept: object, rule: str, *, is_end: bool = False) -> None:
        if not is_kept:
            self._broken.append(rule)
        if self._has_ended:
            self._broken.append("a sink is not called after its end")
        if self._silent_since:
            self._broken.append(f"a sink is not called after {self._silent_since}")
        self._has_ended |= is_end
        self._called.set()
        if self._on_call is not None:
            self._on_call()

    async def _until_ended(self) -> None:
        await self._until(lambda: self._has_ended, "a request ends")
        self.check()
        if self.error is not None:
            raise self.error

    async def _until(self, is_so: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(self._deadline_s):
                while not is_so():
                    self._called.clear()
                    await self._called.wait()
        except TimeoutError:
            self.check()
            demand(False, f"{self.request_id}: {what}, within {self._deadline_s:g} s")


class Output(Recorder):
    """The sink of a generation."""

    def __init__(self, request: GenerateRequest, deadline_s: float, on_call: Callable[[], None] | None) -> None:
        super().__init__(request.request_id, deadline_s, on_call)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.reason = ""
        self.stats: GenerationStats | None = None
        self._request = request
        self._most_tokens = request.sampling.max_tokens - request.num_generated

    def on_prompt_logprobs(self, logprobs: list[TokenLogprobs | None]) -> None:
        """Only where they were asked for, before all else."""
        self._note(
            self._request.sampling.prompt_logprobs >= 0 and not self.tokens, "log probabilities of the prompt come first, if asked for"
        )

    def on_tokens(self, tokens: list[int], logprobs: list[TokenLogprobs] | None = None) -> None:
        """Some tokens, never none, and never more than were asked for."""
        self.tokens += tokens
        self.logprobs += logprobs or []
        is_asked = self._request.sampling.logprobs >= 0
        has_them = logprobs is not None and len(logprobs) == len(tokens) if is_asked else not logprobs
        self._note(tokens, "a call brings at least one token")
        if not has_them:
            self._broken.append("each token has its log probabilities, if they were asked for")
        if len(self.tokens) > self._most_tokens:
            self._broken.append(f"no more than the {self._most_tokens} tokens that were asked for are given out")

    def on_finish(self, reason: str, stats: GenerationStats) -> None:
        """The end."""
        self.reason, self.stats = reason, stats
        is_kept = len(self.tokens) == self._most_tokens if reason == "length" else reason == "stop"
        times = (stats.queue_ms, stats.prefill_ms, stats.decode_ms)
        if (
            stats.num_prompt_tokens != len(self._request.tokens)
            or not 0 <= stats.num_cached_tokens < stats.num_prompt_tokens
            or min(times) < 0
        ):
            self._broken.append(f"the figures of a request are those of its prompt, and no time is negative: {stats}")
        self._note(is_kept, f"a request ends with stop, or with length after all tokens: {reason} after {len(self.tokens)}", is_end=True)

    async def end(self) -> list[int]:
        """All tokens. Raises the error that it ended with."""
        await self._until_ended()
        return self.tokens

    async def reach(self, num_tokens: int) -> None:
        """Wait for so many tokens."""
        await self._until(lambda: len(self.tokens) >= num_tokens or self._has_ended, f"{num_tokens} tokens come")


class Blocks(Recorder):
    """The sink of a prefill of `num_tokens` tokens."""

    def __init__(self, num_tokens: int, first_block: int, block_size: int, deadline_s: float, on_call: Callable[[], None] | None) -> None:
        super().__init__("", deadline_s, on_call)
        self.found: dict[int, tuple[int, bytes]] = {}
        self.num_calls = self.num_cached_tokens = 0
        self._num_tokens, self._block_size, self._first = num_tokens, block_size, first_block
        self._next = first_block

    def on_blocks(self, blocks: list[KVBlock]) -> None:
        """The next ones, with as many tokens as they have."""
        self.num_calls += 1
        for index, num_tokens, payload in blocks:
            self.found[index] = (num_tokens, payload)
            expected = min(self._block_size, self._num_tokens - index * self._block_size)
            is_kept = index == self._next and num_tokens == expected and isinstance(payload, bytes) and len(payload) > 0
            if not is_kept:
                self._broken.append(
                    f"blocks come once each, ascending, with all their tokens: {index} with {num_tokens} of {expected} tokens"
                )
            self._next = index + 1
        self._note(blocks, "a call brings at least one block")

    def on_prefilled(self, num_cached_tokens: int) -> None:
        """The end."""
        self.num_cached_tokens = num_cached_tokens
        end = max(self._first, -(-self._num_tokens // self._block_size))
        self._note(self._next == end, f"all blocks come before the end: {self._next} is the next of {end}", is_end=True)

    def on_prefill_failed(self, error: MeshserveError) -> None:
        """The end too."""
        self.on_error(error)

    async def end(self) -> dict[int, tuple[int, bytes]]:
        """All blocks, as numbers of tokens and payloads. Raises the error that it ended with."""
        await self._until_ended()
        return self.found
