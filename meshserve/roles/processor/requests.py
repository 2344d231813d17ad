"""A client's request from the frontend's call to its end: one sequence at a worker for each answer to each prompt.

If one of them fails the request fails, and the others are cancelled. The first answer to a prompt goes ahead, and the others follow when
its first token is there: by then the prompt's KV is in a cache, and need not be computed or handed over once for each.
"""

import logging
from array import array
from typing import Any, Protocol

from meshserve.errors import Cancelled, DeadlineExceeded, InvalidRequest, MeshserveError
from meshserve.mesh.calls import IncomingCall
from meshserve.observe.receipt_store import Receipts
from meshserve.observe.receipts import OK, Receipt, after_first_token, merged
from meshserve.roles.processor.answers import THINK, AnswerParser
from meshserve.roles.processor.call_formats import Accepts, CallFormat
from meshserve.roles.processor.calling import tools_of, wants_call, writes_calls
from meshserve.roles.processor.choices import Choice, EchoOnly
from meshserve.roles.processor.detokenizing import TokenTexts
from meshserve.roles.processor.parsed_choice import ParsedChoice
from meshserve.roles.processor.plain_choice import PlainChoice
from meshserve.roles.processor.prompts import sampling_of
from meshserve.roles.processor.sequences import Dispatcher, Output, Sequence
from meshserve.telemetry import Phases, log_event
from meshserve.wire.card import ModelCard
from meshserve.wire.completion import CompletionRequest, Ending, EndItem, StartItem
from meshserve.wire.generation import Sampling
from meshserve.wire.structs import replace

_log = logging.getLogger(__name__)
_TAIL_TOKENS = 16
"""Of a prompt: in them stands the tag with which a template begins the reasoning, white space after it included."""
_CONSTRAINTS = {
    "json_schema": "response_format",
    "response_format": "response_format",
    "regex": "structured_outputs",
    "choices": "structured_outputs",
}
"""How a client knows what an engine finds fault with."""


class Role(Dispatcher, Protocol):
    """What requests need of the processor."""

    @property
    def name(self) -> str:
        """This peer's."""

    receipts: Receipts | None
    """Of requests that are over; None if nobody is to keep any."""

    def block_size(self, model: str) -> int:
        """Tokens in a KV block of this model's workers; 0 if none is left."""

    def draw_seed(self) -> int:
        """For a prompt whose request names none."""

    def over(self, request: "Request") -> None:
        """No longer under way."""


class Request:
    """Owns its sequences, which are numbered prompt by prompt."""

    __slots__ = (
        "_accepts",
        "_asked",
        "_call",
        "_card",
        "_first_end",
        "_formats",
        "_is_call",
        "_is_parsed",
        "_is_plain",
        "_num_open",
        "_phases",
        "_prompts",
        "_role",
        "_token_texts",
        "is_over",
        "policy",
        "request_id",
        "sequences",
        "session",
    )

    def __init__(
        self,
        role: Role,
        call: IncomingCall,
        asked: CompletionRequest,
        card: ModelCard,
        prompts: "list[array[int]]",
        token_texts: TokenTexts,
        phases: Phases,
        formats: tuple[CallFormat, ...],
        accepts: Accepts | None = None,
    ) -> None:
        self._role, self._call, self._asked, self._token_texts = role, call, asked, token_texts
        self._formats, self._accepts = formats, accepts
        self.request_id, self.policy, self.session = asked.request_id, asked.policy, asked.session
        self._card, self._prompts, self._phases = card, prompts, phases
        self._is_plain = asked.is_plain
        self._is_call = wants_call(asked, card)
        self._is_parsed = asked.kind == "chat" and writes_calls(card) and not self._is_call and not asked.is_constrained
        self._num_open = asked.n * len(prompts)
        self._first_end = EndItem(0, "", None)
        self.is_over = False
        self.sequences = self._sequences(0)
        for place in range(1, len(prompts)):
            self.sequences += self._sequences(place)
        process_ms = phases.end()
        for sequence in self.sequences:
            sequence.receipt.phases_ms.process = process_ms

    @property
    def block_size(self) -> int:
        """Tokens in a KV block of the model's workers."""
        return self._role.block_size(self._card.model)

    def _sequences(self, place: int) -> list[Sequence]:
        tokens, asked = self._prompts[place], self._asked
        sampling = sampling_of(asked, self._card, len(tokens), self._role.draw_seed())
        first = place * asked.n
        if asked.n == 1:
            return [self._sequence(first, tokens, sampling)]
        later = replace(sampling, prompt_logprobs=-1)  # those of the first are for all
        return [self._sequence(first + k, tokens, replace(later if k else sampling, choice=k)) for k in range(asked.n)]

    def _sequence(self, index: int, tokens: "array[int]", sampling: Sampling) -> Sequence:
        asked = self._asked
        name = self.request_id if self._num_open == 1 else f"{self.request_id}/{index}"
        receipt = Receipt(name, asked.client_id, asked.model, processor=self._role.name, traceparent=asked.traceparent)
        receipt.num_prompt_tokens = len(tokens)
        phases = Phases() if index else self._phases
        return Sequence(self._role, self, receipt, tokens, sampling, self._choice(index, tokens), phases)

    def _choice(self, index: int, tokens: "array[int]") -> Output:
        asked, call, token_texts = self._asked, self._call, self._token_texts
        if self._is_parsed:
            return self._parsed_choice(index, tokens)
        if asked.max_tokens != 0 and asked.logprobs < 0 and not asked.stop and not self._is_call:
            return PlainChoice(call.send, call.send_all, token_texts, index, self._is_plain)
        return (Choice if asked.max_tokens != 0 else EchoOnly)(
            call.send,
            token_texts.token_bytes,
            index,
            is_bare=self._is_plain,
            stops=asked.stop,
            min_tokens=asked.min_tokens,
            wants_logprobs=asked.logprobs >= 0,
            is_call=self._is_call,
        )

    def _parsed_choice(self, index: int, tokens: "array[int]") -> ParsedChoice:
        asked, token_texts = self._asked, self._token_texts
        names = [tool["function"]["name"] for tool in tools_of(asked)] if asked.tool_choice != "none" else []
        last = b"".join(map(token_texts.token_bytes, tokens[-_TAIL_TOKENS:])).rstrip()
        return ParsedChoice(
            self._call.send,
            token_texts.token_bytes,
            index,
            AnswerParser(names, self._formats, is_thinking=last.endswith(THINK.encode()), accepts=self._accepts),
            is_single=not asked.parallel_tool_calls,
            is_bare=self._is_plain,
            stops=asked.stop,
            min_tokens=asked.min_tokens,
            wants_logprobs=asked.logprobs >= 0,
        )

    # --- life

    def start(self) -> None:
        """Send the first answer to each prompt to a worker."""
        if self._asked.wants_start:
            self._call.send(StartItem(sum(map(len, self._prompts))))
        for sequence in self.sequences[:: self._asked.n]:
            self._go(sequence)

    def _go(self, sequence: Sequence) -> None:
        if self.is_over:
            return
        if self._asked.max_tokens == 0 and self._asked.logprobs < 0:
            sequence.end_without_worker()
        else:
            sequence.route()

    def remaining_s(self) -> float:
        """Until the request's deadline."""
        return max(0.001, self._call.deadline_s - self._role.mesh.now_s())

    def scored(self, sequence: Sequence, logprobs: list[Any]) -> None:
        """The prompt's log probabilities, for all answers to it. A second worker, if the first is lost, says them again."""
        first = self.sequences.index(sequence)
        for other in self.sequences[first : first + self._asked.n]:
            if not other.is_scored:
                other.is_scored = True
                other.choice.echo_logprobs(sequence.tokens, logprobs)

    def began(self, sequence: Sequence) -> None:
        """Its first token is about to be given out: it may be time for the prompt, and for the other answers."""
        asked = self._asked
        if not asked.echo and asked.n == 1:
            return
        index = self.sequences.index(sequence)
        if asked.echo and asked.logprobs < 0:
            sequence.choice.echo(self._prompt_text(index // asked.n))
        if index % asked.n == 0:
            for other in self.sequences[index + 1 : index + asked.n]:
                other.waited_ms = other.phases.end()
                self._go(other)

    def _prompt_text(self, place: int) -> str:
        prompt = self._asked.prompts[place]
        if isinstance(prompt, str):
            return prompt
        return b"".join(map(self._token_texts.token_bytes, prompt)).decode("utf-8", "replace")

    # --- the end

    def ended(self, sequence: Sequence, end: EndItem) -> None:
        """One answer is complete."""
        self._num_open -= 1
        if end.choice == 0:
            self._first_end = end
        if not self._is_plain:
            self._call.send(end)
        if not self._num_open:
            self._over()
            receipt = self._finish(sequence, OK)
            wired = receipt.to_wire() if self._asked.wants_receipt else None
            first, usage = self._first_end, (receipt.num_prompt_tokens, receipt.num_completion_tokens, receipt.num_cached_tokens)
            ending = Ending(first.reason, *usage, wired, first.stop)
            self._call.end(ending)

    def _finish(self, last: Sequence, outcome: str, error: str = "") -> Receipt:
        """The receipt: the path of the first answer, the times of the one that the end waited for."""
        receipt = last.receipt if len(self.sequences) == 1 else self._merged_receipt(last)
        receipt.total_ms, receipt.outcome, receipt.error = self._phases.total_ms(), outcome, error
        if self._role.receipts is not None:
            self._role.receipts.keep(receipt)
        self.sequences = []  # they hold this request: only the collector could free them
        return receipt

    def _merged_receipt(self, last: Sequence) -> Receipt:
        receipts = [sequence.receipt for sequence in self.sequences]
        num_cached = sum(receipt.num_cached_tokens for receipt in receipts[:: self._asked.n])
        receipt = merged(receipts, self.request_id, sum(map(len, self._prompts)), num_cached)
        place = self.sequences.index(last)
        first = self.sequences[place - place % self._asked.n]
        receipt.phases_ms = last.receipt.phases_ms
        if first is not last:
            receipt.phases_ms = after_first_token(first.receipt.phases_ms, last.waited_ms, last.receipt.phases_ms)
        return receipt

    def failed(self, sequence: Sequence, error: MeshserveError) -> None:
        """One failed, so all do."""
        if self.is_over:
            return
        if isinstance(error, InvalidRequest) and error.param in _CONSTRAINTS:
            error = type(error)(error.message, param="tools" if self._is_call else _CONSTRAINTS[error.param])
        self.fail(error, sequence)

    def fail(self, error: MeshserveError, sequence: Sequence | None = None) -> None:
        """End it here and now, at its workers too."""
        text = f"request {self.request_id} failed: {error.message}"
        log_event(_log, "request_failed", text, request_id=self.request_id, client_id=self._asked.client_id, code=error.code)
        self._end(error.code, error.message, sequence)
        self._call.fail(error)

    def cancel(self) -> None:
        """The client is gone, or did not wait any longer."""
        ended_by = self._call.ended_by
        self._end(DeadlineExceeded.code if ended_by == "deadline" else Cancelled.code, f"ended by its caller: {ended_by or 'cancel'}")

    def _end(self, outcome: str, error: str, sequence: Sequence | None = None) -> None:
        """Without its output, because of this sequence, or while this one was the first that was not complete."""
        if self.is_over:
            return
        last = sequence or next((found for found in self.sequences if not found.is_over), self.sequences[0])
        self._over()
        for found in self.sequences:
            found.cancel()
        self._finish(last, outcome, error)

    def _over(self) -> None:
        self.is_over = True
        self._role.over(self)
