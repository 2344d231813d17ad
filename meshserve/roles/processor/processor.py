"""The processor role: owns a request from the frontend's call to its last token.

It keeps what is needed to go on elsewhere (prompt, sampling, seed), asks a router which worker, sends the request there, and turns
tokens into text. A worker that is lost before its first token is replaced by another; nothing was given out, so nothing is lost.
"""

import random
from array import array
from typing import Any

from meshserve.errors import Cancelled, InvalidRequest, ProtocolError
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.roles.processor.models import Models
from meshserve.roles.processor.placing import Placer
from meshserve.roles.processor.prompts import check_bias, check_features, check_prompts, encode_all
from meshserve.roles.processor.requests import Request
from meshserve.telemetry import Phases
from meshserve.wire.card import ModelCard
from meshserve.wire.completion import CompletionRequest, Tokenized
from meshserve.wire.generation import unpack_tokens


class ProcessorRole:
    """Serves `complete` (items and end as in :mod:`meshserve.wire.completion`), `tokenize` and `detokenize`."""

    def __init__(self, mesh: Mesh, max_lost_peers: int) -> None:
        self.mesh, self.max_lost_peers = mesh, max_lost_peers
        self.models = Models(mesh)
        self._running: dict[str, Request] = {}
        self.placer = Placer(mesh)
        self._rng = random.Random()
        mesh.serve("complete", self._on_complete)
        mesh.serve("processor.cancel", self._on_cancel)
        mesh.serve("tokenize", self._on_tokenize)
        mesh.serve("detokenize", self._on_detokenize)
        mesh.subscribe(self._on_change)

    @property
    def name(self) -> str:
        """This peer's."""
        return self.mesh.own.name

    @property
    def is_idle(self) -> bool:
        """No request is under way."""
        return not self._running

    def draw_seed(self) -> int:
        """For a prompt whose request names none."""
        return self._rng.getrandbits(62)

    def _on_complete(self, call: IncomingCall) -> None:
        asked = call.body if isinstance(call.body, CompletionRequest) else CompletionRequest.from_wire(call.body)
        if asked.request_id in self._running:
            raise InvalidRequest("a request of this id is under way")
        phases = Phases()
        card, prompts = self._encode(asked)
        tokenizer = self.models.tokenizer(card)
        check_prompts(asked, prompts, card, tokenizer.vocab_size)
        request = Request(self, call, asked, card, prompts, tokenizer.token_bytes, phases)
        self._running[request.request_id] = request
        call.on_cancel = request.cancel
        request.start()

    def _encode(self, asked: CompletionRequest) -> "tuple[ModelCard, list[array[int]]]":
        """Raises what is wrong with a request before anybody works for it."""
        card = self.models.card(asked.model)
        check_features(asked, card)
        tokenizer = self.models.tokenizer(card)
        check_bias(asked, tokenizer.vocab_size)
        return card, encode_all(asked, card, tokenizer)

    def _on_cancel(self, call: IncomingCall) -> None:
        """For a request that no frontend can be asked about: its name. True if it was here."""
        request = self._running.get(call.body) if isinstance(call.body, str) else None
        if request is not None:
            request.fail(Cancelled("this request was cancelled"))
        call.end(request is not None)

    def over(self, request: Request) -> None:
        """No longer under way."""
        self._running.pop(request.request_id, None)

    def _on_change(self, change: Change, member: Member) -> None:
        if change is Change.SUSPECTED and "decode" in member.info.roles:
            for sequence in [sequence for request in self._running.values() for sequence in request.sequences]:
                if sequence.worker == member.info.incarnation and not sequence.is_over:
                    sequence.worker_suspected()

    # --- tokens for those who ask for nothing else

    def _on_tokenize(self, call: IncomingCall) -> None:
        """The end is the prompt's tokens and the model's context length."""
        body: Any = call.body
        if not isinstance(body, list) or len(body) != 2:
            raise ProtocolError("what is to be tokenized is a request, and whether the tokens' texts are wanted")
        card, prompts = self._encode(CompletionRequest.from_wire(body[0]))
        tokens, token_bytes = prompts[0], self.models.tokenizer(card).token_bytes
        pieces = list(map(token_bytes, tokens)) if body[1] else []
        call.end(Tokenized(tokens, card.context_length, b"".join(pieces), array("I", map(len, pieces))).to_wire())

    def _on_detokenize(self, call: IncomingCall) -> None:
        body: Any = call.body
        if not isinstance(body, list) or len(body) != 2 or not isinstance(body[0], str):
            raise ProtocolError("what is to be detokenized is a model and tokens")
        tokenizer = self.models.tokenizer(self.models.card(body[0]))
        tokens = unpack_tokens(body[1])
        if tokens and max(tokens) >= tokenizer.vocab_size:
            raise InvalidRequest(f"this model's last token is {tokenizer.vocab_size - 1}", param="tokens")
        call.end(b"".join(map(tokenizer.token_bytes, tokens)).decode("utf-8", "replace"))
