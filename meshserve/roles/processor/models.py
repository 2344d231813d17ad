"""What a processor knows of the mesh: routers and workers in turn, models with their cards and tokenizers; and what a request means to
a model: prompts of tokens, and sampling parameters.
"""

import asyncio
from array import array
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from itertools import compress, count
from operator import attrgetter
from typing import Any

from xxhash import xxh3_64_intdigest

from meshserve.engines.tokenizers.own import CHAT_TEMPLATE
from meshserve.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, NoWorker, Unsupported
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.roles.processor.detokenizing import TokenTexts
from meshserve.roles.processor.model_files import FileCache, ModelFiles, cache_directory
from meshserve.roles.processor.texts import Chat, ModelText, ProcessText
from meshserve.roles.processor.tools import call_schema, tools_of, wants_call, writes_calls
from meshserve.telemetry import Histograms
from meshserve.wire.card import ModelCard, exact_name
from meshserve.wire.completion import CompletionRequest, DetokenizeRequest, Tokenized, TokenizeRequest
from meshserve.wire.generation import AskedSampling, Sampling, SamplingDefaults
from meshserve.wire.hello import PeerInfo, with_room
from meshserve.wire.messages import DETOKENIZE, TOKENIZE
from meshserve.wire.routing import Candidate, RoutingDecision
from meshserve.wire.structs import asdict, replace

_CHATS_COME_AFTER_S = 0.5
"""What first chats need is made ready once the peer serves, so that it does not delay that."""

MAX_TEXTS = 8
"""Models whose tokenizers are kept loaded, 50 to 300 MB each in processes of their own; those not used for longest go."""

MAX_SCORED_PROMPT_TOKENS = 16_384
"""Of a prompt that is echoed with log probabilities: they make a message many times as long as the prompt."""

MAX_PROMPT_TOKENS = 1_048_576
"""Of one request's prompts, each as often as it is answered: so much is sent to workers at once."""
MAX_UNASKED_TOKENS = 4096
"""What a client gets that names no limit: workers set room aside for all that may come. Higher serves
fewer of them at a time."""

Encoded = tuple[list["array[int]"], TokenTexts]
"""The prompts' tokens, and what tokens stand for."""


_MAX_OUT_OF_REACH = 64
_NO_ROUTER = "round-robin (no router)"


class Dispatcher:
    """What all sequences of a processor share: the mesh, and whose turn it is."""

    def __init__(self, mesh: Mesh, max_lost_peers: int, max_migrations: int, histograms: Histograms | None) -> None:
        self.mesh = mesh
        self.histograms = histograms
        """They are of latencies, a part for each worker; None if nobody wants them."""
        self.max_lost_peers, self.max_migrations = max_lost_peers, max_migrations
        self._router_turn, self._worker_turn = count(), count()
        self._out_of_reach: tuple[str, ...] = ()
        """Workers that a router chose and that this processor does not reach."""

    def next_router(self, asked: tuple[str, ...]) -> str | None:
        """A router that was not asked yet: this peer's own, else each in turn; None if none is left."""
        infos = self.mesh.peers_with("router")
        if infos and not asked and infos[0].incarnation == self.mesh.incarnation:
            return self.mesh.incarnation
        routers = [info.incarnation for info in infos if info.incarnation not in asked]
        if not routers or routers[0] == self.mesh.incarnation:
            return routers[0] if routers else None
        return routers[next(self._router_turn) % len(routers)]

    def workers(self, model: str, card: ModelCard) -> list[PeerInfo]:
        """Those that can take work for the model of this name and card."""
        infos = self.mesh.peers_serving("decode", model)
        if infos and (found := infos[0].card) is not None and found.model_hash != card.model_hash:
            return self.mesh.peers_serving("decode", exact_name(model, card.model_hash))
        return infos

    def has_others(self, model: str, card: ModelCard, tried: tuple[str | None, ...]) -> bool:
        """Whether there is a worker of the model besides these."""
        return any(info.incarnation not in tried for info in self.workers(model, card))

    def successor(self, model: str, card: ModelCard) -> ModelCard | None:
        """Another model that this name leads to now, and that reads text alike: for a prompt of which there is no output yet."""
        infos = self.mesh.peers_serving("decode", model)
        found = infos[0].card if infos else None
        return found if found is not None and found.model_hash != card.model_hash and found.text == card.text else None

    def take_turns(self, model: str, card: ModelCard, excluded: tuple[str, ...], num_tokens: int) -> RoutingDecision:
        """Without a router: live workers of this model that take so many tokens, each time another one first. Raises NoWorker."""
        infos = with_room(self.workers(model, card), num_tokens)
        able = [info.incarnation for info in infos if info.incarnation not in excluded]
        if not able:
            raise NoWorker(f"no decode worker for the model {model!r} can take work now")
        start = next(self._worker_turn) % len(able)
        why = "its turn; there is no router"
        turns = [Candidate(worker, self.mesh.name_of(worker), 0, 0, 0.0, 0.0, why) for worker in able[start:] + able[:start]]
        return RoutingDecision(None, _NO_ROUTER, turns, [])

    def first_reachable(self, candidates: list[Candidate]) -> Candidate | None:
        """The best that this processor can call now, which is moved to the front.

        Routers reach others than this processor does, and notice silence sooner or later; the next questions to them
        name the workers that are out of reach.
        """
        first = candidates[0]
        if self.mesh.can_take_work(first.incarnation):
            return first
        able = [candidate for candidate in candidates if self.mesh.can_take_work(candidate.incarnation)]
        missed = [candidate for candidate in candidates if candidate not in able]
        named = (*self._out_of_reach, *(candidate.incarnation for candidate in missed))
        self._out_of_reach = tuple(dict.fromkeys(named))[-_MAX_OUT_OF_REACH:]
        candidates[:] = able + missed
        return able[0] if able else None

    def card_of(self, worker: str) -> ModelCard | None:
        """Of the model that this worker serves; None if it is not known."""
        info = self.mesh.info_of(worker)
        return info.card if info is not None else None

    def of_model(self, candidates: list[Candidate], card: ModelCard) -> list[Candidate]:
        """Those that serve the very model of this card: another would go on with other tokens."""
        cards = [self.card_of(candidate.incarnation) for candidate in candidates]
        is_same = [found is not None and found.model_hash == card.model_hash for found in cards]
        return list(compress(candidates, is_same))

    def is_waited_for(self, model: str, card: ModelCard) -> bool:
        """Whether a worker of this model is silent: it may be back at any moment."""
        cards = [info.card for info in self.mesh.silent_peers_with("decode") if info.card is not None]
        return any(found.is_called(model) and found.model_hash == card.model_hash for found in cards)

    def out_of_reach(self) -> tuple[str, ...]:
        """Workers that a router should not choose for this processor."""
        if self._out_of_reach:
            self._out_of_reach = tuple(peer for peer in self._out_of_reach if not self.mesh.can_take_work(peer))
        return self._out_of_reach

    def block_size(self, model: str, card: ModelCard) -> int:
        """Tokens in a KV block of this model's workers; 0 if none is left."""
        infos = self.workers(model, card)
        return next((info.layout.block_size for info in infos if info.layout is not None), 0)


class Models:
    """The models that live decode workers serve."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._files = ModelFiles(mesh, FileCache(cache_directory()))
        self._own = ModelText()
        self._texts: OrderedDict[Any, ProcessText] = OrderedDict()
        self._is_closed = False
        self._largest: tuple[list[PeerInfo], ModelCard] | tuple[None, None] = None, None
        """Workers as `peers_serving` gave them last, another list as soon as any peer changes, and the card of one of them."""
        mesh.subscribe(self._on_change)
        mesh.serve_async(TOKENIZE, self._tokenize)
        mesh.serve_async(DETOKENIZE, self._detokenize)
        self._foresee(mesh.own)
        mesh.tasks.spawn(self._foresee_chats())

    async def _foresee_chats(self) -> None:
        await asyncio.sleep(_CHATS_COME_AFTER_S)
        await asyncio.to_thread(self._own.begin)

    def card(self, model: str) -> ModelCard:
        """Of the worker that takes the longest requests. Raises NoWorker if there is no decode worker at all, ModelNotFound if none serves
        this model."""
        serving = self._mesh.peers_serving("decode", model)
        if serving is self._largest[0]:
            return self._largest[1]
        if cards := [info.card for info in serving if info.card is not None]:
            self._largest = serving, max(cards, key=lambda card: card.context_length)
            return self._largest[1]
        # a request for a model whose workers are all silent has to wait, and is prepared meanwhile
        infos = self._mesh.peers_with("decode") + self._mesh.silent_peers_with("decode")
        cards = [info.card for info in infos if info.card is not None]
        for card in cards:
            if card.is_called(model):
                return card
        if not cards:
            raise NoWorker("no decode worker is in the mesh yet")
        names = ", ".join(sorted({name for card in cards for name in card.names}))
        raise ModelNotFound(f"the model {model!r} is not served here; there are: {names}", param="model")

    # --- text

    def text(self, card: ModelCard) -> ModelText:
        """What turns this model's text into tokens; models of equal tokenizer and template share it. For use at once, not to be kept."""
        if _is_own(card):
            return self._own
        key = card.text
        text = self._texts.get(key)
        if text is None:
            self._make_room()
            text = self._texts[key] = ProcessText(self._mesh.tasks, lambda: self._files.get(card.files), card)
        self._texts.move_to_end(key)
        return text

    def _make_room(self) -> None:
        for key in [key for key, text in self._texts.items() if text.is_idle][: max(0, len(self._texts) - MAX_TEXTS + 1)]:
            self._mesh.tasks.spawn(self._texts.pop(key).close())

    def _on_change(self, change: Change, member: Member) -> None:
        if change is Change.CALLABLE and not self._is_closed:
            self._foresee(member.info)

    def _foresee(self, info: PeerInfo) -> None:
        """A worker that can be asked for its files will soon be asked for tokens."""
        card = info.card
        if card is not None and "decode" in info.roles and not _is_own(card) and len(self._texts) < MAX_TEXTS:
            self.text(card).begin()

    async def close(self) -> None:
        """End the processes of all tokenizers."""
        self._is_closed = True
        texts, self._texts = list(self._texts.values()), OrderedDict()
        for text in texts:
            await text.close()

    def template(self, card: ModelCard) -> str:
        """The model's chat template, once a prompt was made with it; empty if it has none, or that was not found out."""
        text = self._texts.get(card.text)
        return text.template if text is not None else card.chat_template

    # --- requests

    def encode_nowait(self, request: CompletionRequest, card: ModelCard) -> Encoded | None:
        """The prompts' tokens and what tokens stand for; None if that has to wait for files or another
        process: :meth:`encode`. Raises as :meth:`encode` does.
        """
        if card.tokenizer != "bytes" or card.chat_template != CHAT_TEMPLATE:
            return None
        own = self._own
        if request.kind == "chat":
            prompts = [own.chat_nowait(_chat_of(request, card))]
        elif isinstance(request.prompt, str):
            prompts = [own.tokenizer.encode(request.prompt)]
        else:
            found = request.prompts
            prompts = [own.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in found]
        if not all(prompts):
            raise _is_empty(request)
        return prompts, own.own_texts

    async def encode(self, request: CompletionRequest, card: ModelCard) -> Encoded:
        """The same for any model. To be cancelled at the request's deadline, or when nobody waits any more.

        Raises InvalidRequest for an empty prompt or a template that refuses, TokenizerFailed if the model's
        files cannot be had.
        """
        text = self.text(card)
        token_texts = await text.token_texts()
        if request.kind == "chat":
            prompts = [await text.encode_chat(_chat_of(request, card))]
        else:
            found = request.prompts
            prompts = [await text.encode(prompt) if isinstance(prompt, str) else prompt for prompt in found]
        if not all(prompts):
            raise _is_empty(request)
        return prompts, token_texts

    async def _tokenize(self, call: IncomingCall) -> Tokenized:
        """The end is the prompt's tokens and the model's context length."""
        wanted: TokenizeRequest = call.body
        asked = wanted.request
        card = self.card(asked.model)
        check_features(asked, card)
        (tokens, *_), token_texts = self.encode_nowait(asked, card) or await self.encode(asked, card)
        pieces = list(map(token_texts.token_bytes, tokens)) if wanted.wants_texts else []
        return Tokenized(tokens, card.context_length, b"".join(pieces), array("I", map(len, pieces)))

    async def _detokenize(self, call: IncomingCall) -> str:
        wanted: DetokenizeRequest = call.body
        text, tokens = self.text(self.card(wanted.model)), wanted.tokens
        token_texts = await text.token_texts()
        if tokens and max(tokens) >= token_texts.vocab_size:
            raise InvalidRequest(f"this model's last token is {token_texts.vocab_size - 1}", param="tokens")
        return await text.decode(tokens)


def _is_own(card: ModelCard) -> bool:
    """Tokenizer and template are this program's own: they need no files, and no fence."""
    return card.tokenizer == "bytes" and card.chat_template == CHAT_TEMPLATE


def _is_empty(request: CompletionRequest) -> InvalidRequest:
    return InvalidRequest("the prompt is empty", param="messages" if request.kind == "chat" else "prompt")


def check_features(request: CompletionRequest, card: ModelCard) -> None:
    """Raises Unsupported, which names the field, for what this model's engine cannot do."""
    has_tools, is_forced = request.tool_choice != "none", wants_call(request, card)
    is_parsed = has_tools and writes_calls(card)
    asked = (
        ("logprobs", "logprobs", request.logprobs >= 0),
        ("presence_penalty", "penalties", request.presence_penalty != 0),
        ("frequency_penalty", "penalties", request.frequency_penalty != 0),
        ("logit_bias", "logit_bias", bool(request.logit_bias)),
        ("repetition_penalty", "penalties", request.repetition_penalty not in (None, 1)),
        ("tools", "tools", has_tools and not is_parsed),
        ("tools", "json_schema", has_tools and not is_parsed),
        ("tool_choice", "json_schema", is_forced and is_parsed),
        ("response_format", "json_schema", bool(request.json_schema)),
        ("structured_outputs", "regex", bool(request.regex or request.choices)),
    )
    for name, feature, is_asked in asked:
        if is_asked and feature not in card.features:
            raise Unsupported(f"{name} is not supported by the model {card.model!r}", param=name)


def _chat_of(request: CompletionRequest, card: ModelCard) -> Chat:
    variables: dict[str, Any] = {"add_generation_prompt": request.add_generation_prompt}
    if writes_calls(card):
        variables["tells_tools"] = True
    return request.messages or [], tools_of(request) if request.tools else None, variables


def check_prompts(
    request: CompletionRequest, prompts: list["array[int]"], card: ModelCard, vocab_size: int
) -> None:
    """Raises ContextLengthExceeded for a prompt that leaves no room, InvalidRequest for what is too much or
    no token at all.
    """
    if request.logit_bias and any(token >= vocab_size for token, _ in request.logit_bias):
        text = f"logit_bias names a token above this model's last, {vocab_size - 1}"
        raise InvalidRequest(text, param="logit_bias")
    wanted = request.max_tokens or 1
    longest = len(prompts[0]) if len(prompts) == 1 else max(map(len, prompts))
    if longest + wanted > card.context_length:
        param = "messages" if request.kind == "chat" else "prompt"
        raise ContextLengthExceeded.of(longest, request.max_tokens or 0, card.context_length, param)
    if request.echo and request.logprobs >= 0 and longest > MAX_SCORED_PROMPT_TOKENS:
        raise InvalidRequest(
            f"echo with logprobs takes prompts of up to {MAX_SCORED_PROMPT_TOKENS} tokens, and this one has"
            f" {longest}",
            param="echo",
        )
    is_one = len(prompts) == request.n == 1  # which fits in the context
    if not is_one and sum(map(len, prompts)) * request.n > max(MAX_PROMPT_TOKENS, card.context_length):
        raise InvalidRequest(
            f"all prompts, each times n, have more than {MAX_PROMPT_TOKENS} tokens",
            param="n" if request.n > 1 else "prompt",
        )
    is_tokens = request.kind == "completion" and not isinstance(request.prompt, str)
    if is_tokens and max(map(max, prompts)) >= vocab_size:
        text = f"the prompt has a token above this model's last, {vocab_size - 1}"
        raise InvalidRequest(text, param="prompt")


_ASKED = tuple(name for name in AskedSampling.__struct_fields__ if name not in ("max_tokens", "seed"))
"""Sampling parameters that are passed on by their names alone, as they are asked for."""
_asked_in = attrgetter(*_ASKED)
_UNASKED = _asked_in(AskedSampling())


@lru_cache(64)
def _unasked_sampling(defaults: SamplingDefaults) -> Sampling:
    return Sampling(**asdict(defaults))


def draw_seed(request: CompletionRequest, place: int) -> int:
    """Of the answers to the prompt at this place, where the client names none. Every processor draws the same, and another
    one for each request.
    """
    return xxh3_64_intdigest((request.origin or request.request_id).encode(), place) >> 2


def sampling_of(
    request: CompletionRequest,
    card: ModelCard,
    num_prompt_tokens: int,
    drawn_seed: int,
    can_be_kept: Callable[[str], bool],
) -> Sampling:
    """The sampling parameters: what the client left open is filled in by the model's card, by the room that
    is left, and by a seed that was drawn for it. `can_be_kept` judges schemas.
    """
    room = min(MAX_UNASKED_TOKENS, card.context_length - num_prompt_tokens)
    # Requests name few parameters: the model's own come as a whole, and only what is asked for is looked at.
    found = replace(
        _unasked_sampling(card.sampling_defaults),
        max_tokens=room if request.max_tokens is None else max(1, request.max_tokens),
        seed=drawn_seed if request.seed is None else request.seed,
    )
    for name, value, unasked in zip(_ASKED, _asked_in(request), _UNASKED, strict=True):
        if value != unasked:
            setattr(found, name, value)
    if request.echo:
        found.prompt_logprobs = request.logprobs
    if request.tool_choice != "none" and wants_call(request, card):
        # the output is made to be a call: whatever else was asked of its form does not count
        found.json_schema, found.regex, found.choices = call_schema(request, can_be_kept), "", ()
    return found
