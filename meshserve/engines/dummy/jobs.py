"""Sequences with what the scheduler does not know of them: tokens, KV contents and who receives the output."""

from abc import ABC, abstractmethod
from array import array

from meshserve.engines.dummy.choosing import Chooser, prompt_logprobs
from meshserve.engines.dummy.contents import Cursor, KVContents
from meshserve.engines.dummy.sampling import next_token
from meshserve.engines.dummy.scheduler import Sequence, Stage
from meshserve.engines.dummy.speech import Speech
from meshserve.engines.protocol import GenerationSink, GenerationStats, PrefillSink
from meshserve.engines.tokenizers import EOS_TOKEN
from meshserve.errors import MeshserveError
from meshserve.wire.generation import GenerateRequest, TokenLogprobs

_ENDED = Stage.ENDED  # as in the scheduler


class Job(Sequence, ABC):
    """A sequence with tokens. `is_live` until it ended or was cancelled: only then may its sink be called."""

    __slots__ = ("cursor", "is_live", "request_id", "tokens")

    def __init__(self, request_id: str, tokens: "array[int]", hashes: list[int], max_new_tokens: int) -> None:
        super().__init__(len(tokens), hashes, max_new_tokens)
        self.request_id = request_id
        self.tokens = tokens
        self.is_live = True
        self.cursor: Cursor | None = None

    def first_to_visit(self, block_size: int) -> int:
        """The first token that the next step has to do with."""
        return self.num_computed

    def visit(self, end: int, contents: KVContents) -> None:
        """Compute what is not computed yet of the tokens before `end`."""
        cursor = self.cursor
        assert cursor is not None, "the step that admits a job opens its cursor"
        if end > cursor.num_tokens:
            cursor.extend(self.tokens[cursor.num_tokens : end])

    @abstractmethod
    def give_out(self) -> str:
        """Tell the sink what the step led to: the next token of a generation. If that was the end, why; else nothing."""

    @abstractmethod
    def finish(self, reason: str, now: float) -> None:
        """Tell the sink that this is all."""

    @abstractmethod
    def fail(self, error: MeshserveError) -> None:
        """Tell the sink that no more will come."""


class GenerationJob(Job):
    """A sequence to be continued, perhaps from where an earlier worker left it. A plain request has no chooser."""

    __slots__ = ("_chooser", "_first", "_sink", "sampling", "speech")

    def __init__(
        self, request: GenerateRequest, hashes: list[int], sink: GenerationSink, chooser: Chooser | None, speech: Speech | None
    ) -> None:
        # a copy, to which the output is appended: after a preemption it is recomputed with the prompt
        super().__init__(request.request_id, request.tokens[:], hashes, request.sampling.max_tokens - request.num_generated)
        self.sampling = request.sampling
        self._first = request.num_generated - 1
        """The position before the first token that is generated here."""
        self._sink, self._chooser, self.speech = sink, chooser, speech

    def give_out(self) -> str:
        """The next token, unless that is the end of sequence."""
        logprobs: TokenLogprobs | None = None
        if self._chooser is None:
            token = next_token(self.cursor.context, self.sampling, self._first + self.num_generated)  # type: ignore[union-attr]  # open while it runs
        else:
            token, logprobs = self._chooser.choose(self.cursor.context, self._first + self.num_generated)  # type: ignore[union-attr]
        if token == EOS_TOKEN:
            return "stop"
        if self.speech is not None:
            token = self.speech.from_own(token)
            logprobs = self.speech.spoken(logprobs) if logprobs else None
        self.tokens.append(token)
        self._sink.on_tokens([token], [logprobs] if logprobs else None)
        return "length" if self.stage is _ENDED else ""

    def finish(self, reason: str, now: float) -> None:
        """With what was measured, if the last token came at `now`."""
        started_at = now if self.started_at is None else self.started_at
        first_token_at = now if self.first_token_at is None else self.first_token_at
        stats = GenerationStats(
            self.num_tokens,
            self.num_cached or 0,
            (started_at - self.added_at) * 1000,
            (first_token_at - started_at) * 1000,
            (now - first_token_at) * 1000,
        )
        self._sink.on_finish(reason, stats)

    def fail(self, error: MeshserveError) -> None:
        """No more tokens."""
        self._sink.on_error(error)


class RatedJob(GenerationJob):
    """A sequence whose prompt is rated too, from its KV, however that came here. `rated` outlives a preemption."""

    __slots__ = ("num_prompt", "rated")

    def __init__(
        self, request: GenerateRequest, hashes: list[int], sink: GenerationSink, chooser: Chooser | None, speech: Speech | None
    ) -> None:
        super().__init__(request, hashes, sink, chooser, speech)
        self.num_prompt = len(request.tokens)
        self.rated: list[TokenLogprobs | None] = []

    def first_to_visit(self, block_size: int) -> int:
        """Cached tokens too, if they are still to be rated."""
        return min(self.num_computed, len(self.rated))

    def visit(self, end: int, contents: KVContents) -> None:
        """Compute up to `end`, rate what was not rated yet, and give the ratings out with the last one."""
        super().visit(end, contents)
        start, stop = len(self.rated), min(end, self.num_prompt)
        if start >= stop:
            return
        for index, context in enumerate(contents.contexts(self.blocks, start, stop), start):
            self.rated.append(self._rate(context, index) if index else None)
        if stop == self.num_prompt:
            self._sink.on_prompt_logprobs(self.rated)

    def _rate(self, context: int, index: int) -> TokenLogprobs:
        token, num_alternatives, speech = self.tokens[index], self.sampling.prompt_logprobs, self.speech
        if speech is None:
            return prompt_logprobs(context, index, token, num_alternatives)
        return speech.spoken(prompt_logprobs(context, index, speech.to_own(token), num_alternatives, speech.vocab_size))


class PrefillJob(Job):
    """A prompt whose blocks are given out as they are computed. `next_block` outlives a preemption: no block is given out twice."""

    __slots__ = ("_sink", "next_block")

    def __init__(self, request_id: str, tokens: "array[int]", hashes: list[int], first_block: int, sink: PrefillSink) -> None:
        super().__init__(request_id, tokens, hashes, 0)
        self.next_block = first_block
        self._sink = sink

    def first_to_visit(self, block_size: int) -> int:
        """Cached tokens too, if their blocks are still to be given out."""
        return min(self.num_computed, self.next_block * block_size)

    def visit(self, end: int, contents: KVContents) -> None:
        """Compute up to `end` and give out the blocks that are complete with it."""
        super().visit(end, contents)
        size = contents.block_size
        while self.stage is Stage.RUNNING and self.next_block * size < end:
            index = self.next_block
            num_tokens = min(size, self.num_tokens - index * size)
            if index * size + num_tokens > end:
                break
            self.next_block += 1
            self._sink.on_block(index, num_tokens, contents.read(self.blocks[index], num_tokens))

    def give_out(self) -> str:
        """Its blocks were given out as they were computed."""
        return "computed"

    def finish(self, reason: str, now: float) -> None:
        """With what was cached."""
        self._sink.on_finish(self.num_cached or 0)

    def fail(self, error: MeshserveError) -> None:
        """No more blocks."""
        self._sink.on_error(error)
