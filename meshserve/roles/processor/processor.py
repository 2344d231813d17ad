"""The processor role: owns a request from the frontend's call to its last token.

It keeps what is needed to go on elsewhere (prompt, sampling, seed), asks a router which worker, sends the request there, and turns
tokens into text. A worker that is lost before its first token is replaced by another; nothing was given out, so nothing is lost.
"""

import asyncio
import random
from array import array
from collections.abc import Callable

from meshserve.errors import Cancelled, InvalidRequest, MeshserveError
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.observe.receipt_store import Receipts
from meshserve.observe.receipts import Receipt
from meshserve.roles.processor.call_formats import formats_of
from meshserve.roles.processor.calling import writes_calls
from meshserve.roles.processor.detokenizing import TokenTexts
from meshserve.roles.processor.models import Models
from meshserve.roles.processor.prompts import check_bias, check_features, check_prompts
from meshserve.roles.processor.requests import Request
from meshserve.roles.processor.sequences import Sequence
from meshserve.roles.processor.strict_calls import StrictCalls
from meshserve.roles.processor.worker_search import WorkerFinder
from meshserve.telemetry import Phases
from meshserve.wire.card import ModelCard
from meshserve.wire.completion import CompletionRequest, DetokenizeRequest, Tokenized, TokenizeRequest
from meshserve.wire.messages import CANCEL_AT_PROCESSOR, COMPLETE, DETOKENIZE, TOKENIZE

Encoded = tuple[list["array[int]"], TokenTexts]
"""The prompts' tokens, and what tokens stand for."""


class Preparing:
    """A request whose prompt is being made into tokens, elsewhere."""

    sequences: tuple[Sequence, ...] = ()

    def __init__(self, call: IncomingCall, task: "asyncio.Task[None]", keep: Callable[[MeshserveError], None]) -> None:
        self._call, self._task, self._keep = call, task, keep

    def fail(self, error: MeshserveError) -> None:
        """End it here and now."""
        self._keep(error)
        self._task.cancel()
        self._call.fail(error)

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._keep(Cancelled("ended by its caller while its prompt was made into tokens"))
        self._task.cancel()


class ProcessorRole:
    """Serves `complete` (items and end as in :mod:`meshserve.wire.completion`), `tokenize` and `detokenize`."""

    def __init__(self, mesh: Mesh, max_lost_peers: int, receipts: Receipts | None = None) -> None:
        self.mesh, self.max_lost_peers, self.receipts = mesh, max_lost_peers, receipts
        self.name = mesh.own.name
        """This peer's."""
        self.histograms = mesh.histograms if receipts is not None else None
        self.models = Models(mesh)
        self._running: dict[str, Request | Preparing] = {}
        self.finder = WorkerFinder(mesh)
        self._strict_calls = StrictCalls()
        self._rng = random.Random()
        mesh.gauges.derive("requests", lambda: len(self._running))
        mesh.serve(COMPLETE, self._on_complete)
        mesh.serve(CANCEL_AT_PROCESSOR, self._on_cancel)
        mesh.serve_async(TOKENIZE, self._tokenize)
        mesh.serve_async(DETOKENIZE, self._detokenize)
        mesh.subscribe(self._on_change)

    @property
    def is_idle(self) -> bool:
        """No request is under way."""
        return not self._running

    def block_size(self, model: str) -> int:
        """Tokens in a KV block of this model's workers; 0 if none is left."""
        return self.models.block_size(model)

    def draw_seed(self) -> int:
        """For a prompt whose request names none."""
        return self._rng.getrandbits(62)

    def _on_complete(self, call: IncomingCall) -> None:
        asked: CompletionRequest = call.body
        if asked.request_id in self._running:
            raise InvalidRequest("a request of this id is under way")
        phases = Phases()
        try:
            card = self.models.card(asked.model)
            if asked.needs_features:
                check_features(asked, card)
            encoded = self.models.encode_nowait(asked, card)
            if encoded is not None:
                self._start(call, asked, card, encoded, phases)
                return
        except MeshserveError as error:
            self._keep_refused(asked, phases, error)
            raise
        task = self.mesh.tasks.spawn(self._start_later(call, asked, card, phases))
        preparing = Preparing(call, task, lambda error: self._keep_refused(asked, phases, error))
        self._running[asked.request_id] = preparing
        call.on_cancel = preparing.cancel

    def _keep_refused(self, asked: CompletionRequest, phases: Phases, error: MeshserveError) -> None:
        """The receipt of a request that no worker saw."""
        if self.receipts is None:
            return
        process_ms = phases.end()
        receipt = Receipt(asked.request_id, asked.client_id, asked.model, processor=self.name, traceparent=asked.traceparent)
        receipt.phases_ms.process = process_ms
        receipt.total_ms, receipt.outcome, receipt.error = process_ms, error.code, error.message
        self.receipts.keep(receipt)

    def _start(self, call: IncomingCall, asked: CompletionRequest, card: ModelCard, encoded: Encoded, phases: Phases) -> None:
        """Raises what is wrong with a request before anybody works for it."""
        prompts, token_texts = encoded
        if asked.logit_bias:
            check_bias(asked, token_texts.vocab_size)
        check_prompts(asked, prompts, card, token_texts.vocab_size)
        writes = writes_calls(card)
        formats = formats_of(self.models.template(card)) if writes else ()
        accepts = self._strict_calls.judge(asked) if writes else None
        request = Request(self, call, asked, card, prompts, token_texts, phases, formats, accepts)
        self._running[request.request_id] = request
        call.on_cancel = request.cancel
        request.start()

    async def _start_later(self, call: IncomingCall, asked: CompletionRequest, card: ModelCard, phases: Phases) -> None:
        """For a model whose tokenizer is not this program's own. Cancelled with the call, so at its deadline too."""
        try:
            encoded = await self.models.encode(asked, card)
        except MeshserveError as error:
            self._keep_refused(asked, phases, error)
            call.fail(error)
            return
        finally:
            self._running.pop(asked.request_id, None)
        try:
            self._start(call, asked, card, encoded, phases)
        except MeshserveError as error:
            self._keep_refused(asked, phases, error)
            call.fail(error)

    async def close(self) -> None:
        """Nothing of it is left."""
        await self.models.close()

    def _on_cancel(self, call: IncomingCall) -> None:
        """For a request that no frontend can be asked about: its name. True if it was here."""
        request = self._running.get(call.body)
        if request is not None:
            request.fail(Cancelled("this request was cancelled"))
        call.end(request is not None)

    def over(self, request: Request) -> None:
        """No longer under way."""
        self._running.pop(request.request_id, None)

    def _on_change(self, change: Change, member: Member) -> None:
        if change in (Change.DIED, Change.LEFT) and self.histograms is not None:
            self.histograms.fold(member.info.incarnation)  # its streams ended before anybody was told
        if change is Change.SUSPECTED and "decode" in member.info.roles:
            for sequence in [sequence for request in self._running.values() for sequence in request.sequences]:
                if sequence.worker == member.info.incarnation and not sequence.is_over:
                    sequence.worker_suspected()

    # --- tokens for those who ask for nothing else

    async def _tokenize(self, call: IncomingCall) -> Tokenized:
        """The end is the prompt's tokens and the model's context length."""
        wanted: TokenizeRequest = call.body
        asked = wanted.request
        card = self.models.card(asked.model)
        check_features(asked, card)
        (tokens, *_), token_texts = self.models.encode_nowait(asked, card) or await self.models.encode(asked, card)
        pieces = list(map(token_texts.token_bytes, tokens)) if wanted.wants_texts else []
        return Tokenized(tokens, card.context_length, b"".join(pieces), array("I", map(len, pieces)))

    async def _detokenize(self, call: IncomingCall) -> str:
        wanted: DetokenizeRequest = call.body
        text, tokens = self.models.text(self.models.card(wanted.model)), wanted.tokens
        token_texts = await text.token_texts()
        if tokens and max(tokens) >= token_texts.vocab_size:
            raise InvalidRequest(f"this model's last token is {token_texts.vocab_size - 1}", param="tokens")
        return await text.decode(tokens)
