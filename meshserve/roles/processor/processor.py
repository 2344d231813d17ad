"""The processor role: owns a request from the frontend's call to its last token.

A request goes from top to bottom: `begin` makes its tokens, `_start` its sequences, one at a worker for each answer to each prompt; each
sequence finds its worker and turns tokens into text (:mod:`~meshserve.roles.processor.sequences`); `_over` is the end of each. If one
sequence fails the request fails, and the others are cancelled. The first answer to a prompt goes ahead, and the others follow when its
first token is there: by then the prompt's KV is in a cache, and need not be computed or handed over once for each.
"""

import asyncio
import logging
from array import array
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from meshserve.config import ServeConfig
from meshserve.errors import Cancelled, DeadlineExceeded, InvalidRequest, MeshserveError
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.membership import Change, Member, PeerState
from meshserve.mesh.mesh import Mesh
from meshserve.observe.receipt_store import Receipts
from meshserve.observe.receipts import OK, Receipt, after_first_token, merged
from meshserve.roles.processor.accounts import Account
from meshserve.roles.processor.answers import THINK, AnswerParser
from meshserve.roles.processor.call_formats import Accepts, CallFormat, CallParser, formats_of
from meshserve.roles.processor.choices import Choice, EchoOnly, PlainChoice
from meshserve.roles.processor.detokenizing import TokenTexts
from meshserve.roles.processor.kept_responses import KeptResponses, Recorded, ResponseStore
from meshserve.roles.processor.models import Dispatcher, Models, check_features, check_prompts, draw_seed, sampling_of
from meshserve.roles.processor.sequences import Sequence
from meshserve.roles.processor.stalls import watch_stalls
from meshserve.roles.processor.taken import is_taken
from meshserve.roles.processor.tools import StrictCalls, in_fields, tools_of, wants_call, writes_calls
from meshserve.telemetry import log_event
from meshserve.wire.card import ModelCard
from meshserve.wire.completion import CompletionRequest, Ending, EndItem, StartItem
from meshserve.wire.generation import Sampling
from meshserve.wire.messages import CANCEL_AT_PROCESSOR, COMPLETE, IS_TAKEN
from meshserve.wire.structs import replace

_log = logging.getLogger(__name__)
_STALL_TIMEOUT_S = ServeConfig().stall_timeout_s
_TAIL_TOKENS = 16
"""Of a prompt: in them stands the tag with which a template begins the reasoning, white space after it
included."""


class ProcessorRole:
    """Serves `complete`, as in :mod:`meshserve.wire.completion`; its models serve `tokenize` and `detokenize`."""

    def __init__(
        self, mesh: Mesh, max_lost_peers: int, max_migrations: int,
        receipts: Receipts | None = None, stall_timeout_s: float = _STALL_TIMEOUT_S, store: ResponseStore | None = None,
    ) -> None:
        self.mesh, self.name, self.receipts = mesh, mesh.own.name, receipts
        """The name is this peer's; receipts are of requests that are over; None if nobody is to keep any."""
        self.models = Models(mesh)
        self.dispatcher = Dispatcher(mesh, max_lost_peers, max_migrations, None if receipts is None else mesh.histograms)
        self.strict_calls = StrictCalls()
        self.kept = KeptResponses(mesh, store if store is not None else ResponseStore())
        self.running: dict[str, Request] = {}
        """By name, also while their prompts are made into tokens."""
        mesh.gauges.derive("requests", lambda: len(self.running))
        mesh.serve(COMPLETE, self._on_complete)
        mesh.serve(CANCEL_AT_PROCESSOR, self._on_cancel)
        mesh.serve_async(IS_TAKEN, self._is_taken)
        mesh.subscribe(self._on_change)
        mesh.tasks.spawn(watch_stalls(mesh, stall_timeout_s, self._sequences))

    def _sequences(self) -> list[Sequence]:
        return [sequence for request in list(self.running.values()) for sequence in request.sequences if not sequence.is_over]

    @property
    def is_idle(self) -> bool:
        """No request is under way."""
        return not self.running

    def _on_complete(self, call: IncomingCall) -> None:
        asked: CompletionRequest = call.body
        if asked.request_id in self.running:
            raise InvalidRequest("a request of this id is under way")
        used = call if asked.keep is None else self.kept.recorded(call, asked, asked.keep)
        request = self.running[asked.request_id] = Request(self, used, asked)
        call.on_cancel = request.cancel
        request.begin()

    def _on_cancel(self, call: IncomingCall) -> None:
        """For a request that no frontend can be asked about: its name. True if it was here."""
        request = self.running.get(call.body)
        if request is not None:
            request.fail(Cancelled("this request was cancelled"))
        call.end(request is not None)

    async def _is_taken(self, call: IncomingCall) -> bool:
        sequences = request.sequences if (request := self.running.get(call.body)) is not None else []
        return await is_taken(self.mesh, ((found.worker, found.receipt.request_id) for found in sequences if not found.is_over))

    def _on_change(self, change: Change, member: Member) -> None:
        incarnation, histograms = member.info.incarnation, self.dispatcher.histograms
        if change in (Change.DIED, Change.LEFT) and histograms is not None:
            histograms.fold(incarnation)  # its streams ended before anybody was told
        if change in (Change.SUSPECTED, Change.RECOVERED, Change.CALLABLE) and "decode" in member.info.roles:
            self._leave_silent_workers()

    def _leave_silent_workers(self) -> None:
        """Have other workers take over from those that are suspect, also where none was there when they fell silent."""
        silent = {member.info.incarnation for member in self.mesh.links.membership.listed() if member.state is PeerState.SUSPECT}
        if silent:
            for sequence in self._sequences():
                if sequence.worker in silent:
                    sequence.worker_suspected()

    async def close(self) -> None:
        """Nothing of it is left."""
        await self.models.close()


@dataclass(slots=True, eq=False)
class Request:
    """What one client asked. Owns its sequences, which are numbered prompt by prompt."""

    role: ProcessorRole
    call: IncomingCall | Recorded
    asked: CompletionRequest
    began_s: float = field(default_factory=monotonic)
    """When the request came."""
    card: ModelCard = field(init=False)
    token_texts: TokenTexts = field(init=False)
    prompts: list["array[int]"] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    is_over: bool = False
    _encoding: "asyncio.Task[None] | None" = None
    """While the prompts are made into tokens elsewhere."""
    _num_open: int = 0
    """Sequences that are not over."""
    _is_plain: bool = False
    """Items are bare strings."""
    _is_call: bool = False
    """The answer is made to be a call, by a schema."""
    _is_parsed: bool = False
    """The model writes reasoning and calls as text."""
    _formats: tuple[CallFormat, ...] = ()
    _accepts: Accepts | None = None
    _first_end: EndItem | None = None

    # --- tokens

    def begin(self) -> None:
        """Make the prompts into tokens and start. Raises what is wrong before a worker sees it."""
        models, asked = self.role.models, self.asked
        try:
            self.card = card = models.card(asked.model)
            if asked.needs_features:
                check_features(asked, card)
            encoded = models.encode_nowait(asked, card)
            if encoded is None:  # the tokenizer is not this program's own: it has a process
                self._encoding = self.role.mesh.tasks.spawn(self._begin_later())
            else:
                self._start(*encoded)
        except MeshserveError as error:
            self._refuse(error)
            raise

    async def _begin_later(self) -> None:
        """Cancelled with the call, so at its deadline too."""
        try:
            encoded = await self.role.models.encode(self.asked, self.card)
            self._encoding = None
            self._start(*encoded)
        except MeshserveError as error:
            self._refuse(error)
            self.call.fail(error)

    def _refuse(self, error: MeshserveError) -> None:
        """Keep the receipt of a request that no worker saw."""
        self._close()
        if self.role.receipts is not None:
            receipt = self._new_receipt(self.asked.request_id)
            receipt.phases_ms.process = receipt.total_ms = (monotonic() - self.began_s) * 1000
            receipt.outcome, receipt.error = error.code, error.message
            self.role.receipts.keep(receipt)

    def _new_receipt(self, name: str) -> Receipt:
        asked, role = self.asked, self.role
        return Receipt(
            name,
            asked.client_id,
            asked.model,
            processor=role.name,
            traceparent=asked.traceparent,
            kind=asked.kind,
        )

    # --- sequences

    def _start(self, prompts: list["array[int]"], token_texts: TokenTexts) -> None:
        """Make the sequences, and send the first answer to each prompt to a worker."""
        asked, card = self.asked, self.card
        self.prompts, self.token_texts, self._is_plain = prompts, token_texts, asked.is_plain
        check_prompts(asked, prompts, card, token_texts.vocab_size)
        if asked.kind == "chat" or asked.tool_choice != "none":
            self._prepare_answers()
        self._num_open = asked.n * len(prompts)
        for place, tokens in enumerate(prompts):
            sampling = sampling_of(asked, card, len(tokens), draw_seed(asked, place), self.role.strict_calls.can_be_kept)
            for choice in range(asked.n):
                if choice:  # the prompt's log probabilities of the first answer are for all
                    sampling = replace(sampling, choice=choice, prompt_logprobs=-1)
                self._add_sequence(tokens, sampling)
        now_s = monotonic()
        for sequence in self.sequences:
            sequence.account.last_s = now_s
            sequence.receipt.phases_ms.process = (now_s - self.began_s) * 1000
        if asked.wants_start:
            self.call.send(StartItem(sum(map(len, prompts))))
        for sequence in self.sequences[:: asked.n]:
            sequence.route()

    def _prepare_answers(self) -> None:
        """What it takes to read reasoning and calls in the answers."""
        asked, card = self.asked, self.card
        self._is_call = asked.tool_choice != "none" and wants_call(asked, card)
        if writes_calls(card):
            self._is_parsed = asked.kind == "chat" and not self._is_call and not asked.is_constrained
            self._formats = formats_of(self.role.models.template(card))
            self._accepts = self.role.strict_calls.judge(asked)

    def _add_sequence(self, tokens: "array[int]", sampling: Sampling) -> None:
        asked, call, index = self.asked, self.call, len(self.sequences)
        dispatcher = self.role.dispatcher
        receipt = self._new_receipt(asked.request_id if self._num_open == 1 else f"{asked.request_id}/{index}")
        receipt.num_prompt_tokens = len(tokens)
        choice: Choice | PlainChoice
        if self._is_parsed or self._is_call or asked.max_tokens == 0 or asked.logprobs >= 0 or asked.stop:
            choice = self._choice(index, tokens)
        else:
            choice = PlainChoice(call.send, call.send_all, self.token_texts, index, self._is_plain)
        sequence = Sequence(
            dispatcher,
            call.deadline_s,
            asked,
            self.card,
            receipt,
            Account(receipt, self.began_s, self.began_s, dispatcher.histograms, dispatcher.mesh.name_of),
            tokens,
            sampling,
            choice,
            self._began if asked.echo or asked.n > 1 else None,
            self._scored,
            self._over,
        )
        if dispatcher.mesh.event_log.is_on:
            sequence.note_submitted()
        self.sequences.append(sequence)

    def _choice(self, index: int, tokens: "array[int]") -> Choice:
        """What makes text of the tokens of a sequence whose text is not all there is to it."""
        asked, token_bytes = self.asked, self.token_texts.token_bytes
        parser: AnswerParser | CallParser | None = CallParser() if self._is_call else None
        if self._is_parsed:
            tools = tools_of(asked) if asked.tool_choice != "none" else []
            names = [tool["function"]["name"] for tool in tools]
            last = b"".join(map(token_bytes, tokens[-_TAIL_TOKENS:])).rstrip()
            is_thinking = last.endswith(THINK.encode())
            parser = AnswerParser(names, self._formats, is_thinking=is_thinking, accepts=self._accepts)
        return (EchoOnly if asked.max_tokens == 0 and not self._is_parsed else Choice)(
            self.call.send,
            token_bytes,
            index,
            is_bare=self._is_plain,
            stops=asked.stop,
            min_tokens=asked.min_tokens,
            wants_logprobs=asked.logprobs >= 0,
            parser=parser,
            is_single=self._is_parsed and not asked.parallel_tool_calls,
            vocab_size=self.token_texts.vocab_size,
        )

    def _scored(self, sequence: Sequence, logprobs: list[Any]) -> None:
        """Give the prompt's log probabilities to all answers to it. A second worker, if the first is lost,
        says them again.
        """
        first = self.sequences.index(sequence)
        for other in self.sequences[first : first + self.asked.n]:
            if not other.is_scored:
                other.choice.echo_logprobs(sequence.tokens, logprobs)
                other.is_scored = True

    def _began(self, sequence: Sequence) -> None:
        """A first token is about to be given out: it is time for the prompt, and for the other answers."""
        asked = self.asked
        index = self.sequences.index(sequence)
        if asked.echo and asked.logprobs < 0:
            sequence.choice.echo(self._prompt_text(index // asked.n))
        if index % asked.n == 0:
            for other in self.sequences[index + 1 : index + asked.n]:
                other.waited_ms = other.account.end_phase()
                other.route()

    def _prompt_text(self, place: int) -> str:
        prompt = self.asked.prompts[place]
        if isinstance(prompt, str):
            return prompt
        return b"".join(map(self.token_texts.token_bytes, prompt)).decode("utf-8", "replace")

    # --- the end

    def _over(self, sequence: Sequence, found: EndItem | MeshserveError) -> None:
        """One sequence is complete, or failed: then all do."""
        if isinstance(found, MeshserveError):
            self._failed(sequence, found)
            return
        self._num_open -= 1
        if found.choice == 0:
            self._first_end = found
        if not self._is_plain:
            self.call.send(found)
        if self._num_open:
            return
        self._close()
        receipt = self._keep_receipt(sequence, OK)
        first = self._first_end or found
        receipt.reason = first.reason
        self.call.end(
            Ending(
                first.reason,
                receipt.num_prompt_tokens,
                receipt.num_completion_tokens,
                receipt.num_cached_tokens,
                receipt.to_wire() if self.asked.wants_receipt else None,
                first.stop,
            )
        )

    def _close(self) -> None:
        self.is_over = True
        self.role.running.pop(self.asked.request_id, None)

    def _keep_receipt(self, last: Sequence, outcome: str, error: str = "") -> Receipt:
        """The path of the first answer, the times of the one that the end waited for."""
        receipt = last.receipt if len(self.sequences) == 1 else self._merged_receipt(last)
        receipt.total_ms = (monotonic() - self.began_s) * 1000
        receipt.outcome, receipt.error = outcome, error
        if self.role.receipts is not None:
            self.role.receipts.keep(receipt)
        self.sequences = []  # they hold this request: only the collector could free them
        return receipt

    def _merged_receipt(self, last: Sequence) -> Receipt:
        receipts = [sequence.receipt for sequence in self.sequences]
        num_cached = sum(receipt.num_cached_tokens for receipt in receipts[:: self.asked.n])
        receipt = merged(receipts, self.asked.request_id, sum(map(len, self.prompts)), num_cached)
        place = self.sequences.index(last)
        first = self.sequences[place - place % self.asked.n]
        receipt.phases_ms = last.receipt.phases_ms
        if first is not last:
            own_ms = last.receipt.phases_ms
            receipt.phases_ms = after_first_token(first.receipt.phases_ms, last.waited_ms, own_ms)
        return receipt

    def _failed(self, sequence: Sequence, error: MeshserveError) -> None:
        if self.is_over:
            return
        self.fail(in_fields(error, self.asked, is_call=self._is_call), sequence)

    def fail(self, error: MeshserveError, sequence: Sequence | None = None) -> None:
        """End the request here and now, at its workers too."""
        if self._encoding is not None:
            self._stop_encoding(error)
        else:
            name = self.asked.request_id
            text, client_id = f"request {name} failed: {error.message}", self.asked.client_id
            log_event(_log, "request_failed", text, request_id=name, client_id=client_id, code=error.code)
            self._end(error.code, error.message, sequence)
        self.call.fail(error)

    def cancel(self) -> None:
        """The client is gone, or did not wait any longer."""
        if self._encoding is not None:
            self._stop_encoding(Cancelled("ended by its caller while its prompt was made into tokens"))
            return
        ended_by = self.call.ended_by
        code = DeadlineExceeded.code if ended_by == "deadline" else Cancelled.code
        self._end(code, f"ended by its caller: {ended_by or 'cancel'}")

    def _stop_encoding(self, error: MeshserveError) -> None:
        assert self._encoding is not None
        self._encoding.cancel()
        self._encoding = None
        self._refuse(error)

    def _end(self, outcome: str, error: str, sequence: Sequence | None = None) -> None:
        """End without output, because of this sequence, or while this one was the first not complete."""
        if self.is_over:
            return
        last = sequence or next((found for found in self.sequences if not found.is_over), self.sequences[0])
        self._close()
        for found in self.sequences:
            found.cancel()
        self._keep_receipt(last, outcome, error)
