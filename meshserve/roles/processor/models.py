"""What a processor needs of each model in the mesh: its card, its tokenizer, and prompts made of requests."""

from array import array
from collections import OrderedDict
from typing import Any

from meshserve.engines.tokenizers import Vocabulary
from meshserve.engines.tokenizers.own import CHAT_TEMPLATE
from meshserve.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, NoWorker
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.roles.processor.file_cache import FileCache, cache_directory
from meshserve.roles.processor.model_files import ModelFiles
from meshserve.roles.processor.texts import ModelText, OwnText, ProcessText
from meshserve.wire.card import ModelCard
from meshserve.wire.completion import CompletionRequest
from meshserve.wire.generation import Sampling
from meshserve.wire.hello import PeerInfo

MAX_TEXTS = 8
"""Models whose tokenizers are kept loaded, 50 to 300 MB each in processes of their own; those not used for longest go."""


class Models:
    """The models that live decode workers serve."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._files = ModelFiles(mesh, FileCache(cache_directory()))
        self._own = OwnText()
        self._texts: OrderedDict[Any, ProcessText] = OrderedDict()
        self._is_closed = False
        mesh.subscribe(self._on_change)
        self._foresee(mesh.own)

    def card(self, model: str) -> ModelCard:
        """Raises NoWorker if there is no decode worker at all, ModelNotFound if none serves this model."""
        cards = [info.card for info in self._mesh.peers_with("decode") if info.card is not None]
        for card in cards:
            if card.model == model:
                return card
        if not cards:
            raise NoWorker("no decode worker is in the mesh yet")
        names = ", ".join(sorted({card.model for card in cards}))
        raise ModelNotFound(f"the model {model!r} is not served here; there are: {names}", param="model")

    # --- text

    def text(self, card: ModelCard) -> ModelText:
        """What turns this model's text into tokens; models of equal tokenizer and template share it. For use at once, not to be kept."""
        if _is_own(card):
            return self._own
        key = (card.tokenizer, card.chat_template, card.files)
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

    # --- requests

    def encode_nowait(self, request: CompletionRequest, card: ModelCard) -> "tuple[array[int], Vocabulary] | None":
        """The prompt's tokens and what tokens stand for; None if that has to wait for files or another process: :meth:`encode`.

        Raises as :meth:`encode` does.
        """
        if not _is_own(card):
            return None
        if request.kind == "chat":
            tokens = self._own.chat_nowait(request.messages or [])
        elif isinstance(request.prompt, str):
            tokens = self._own.tokenizer.encode(request.prompt)
        else:
            tokens = array("I", request.prompt or ())
        return _checked(tokens, request, card), self._own.tokenizer

    async def encode(self, request: CompletionRequest, card: ModelCard) -> "tuple[array[int], Vocabulary]":
        """The same for any model. To be cancelled at the request's deadline, or when nobody waits any more.

        Raises InvalidRequest for an empty prompt or a template that refuses, ContextLengthExceeded for one that leaves no room,
        TokenizerFailed if the model's files cannot be had.
        """
        text = self.text(card)
        vocabulary = await text.vocabulary()
        if request.kind == "chat":
            tokens = await text.encode_chat(request.messages or [])
        elif isinstance(request.prompt, str):
            tokens = await text.encode(request.prompt)
        else:
            tokens = array("I", request.prompt or ())
        return _checked(tokens, request, card), vocabulary

    @staticmethod
    def sampling(request: CompletionRequest, card: ModelCard, num_prompt_tokens: int, drawn_seed: int) -> Sampling:
        """What the client left open is filled in by the model's card, the room that is left, and a seed that was drawn for it."""
        return Sampling(
            max_tokens=request.max_tokens if request.max_tokens is not None else card.context_length - num_prompt_tokens,
            min_tokens=request.min_tokens,
            temperature=request.temperature if request.temperature is not None else card.default_temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed if request.seed is not None else drawn_seed,
            ignore_eos=request.ignore_eos,
        )


def _is_own(card: ModelCard) -> bool:
    """Tokenizer and template are this program's own: they need no files, and no fence."""
    return card.tokenizer == "bytes" and card.chat_template == CHAT_TEMPLATE


def _checked(tokens: "array[int]", request: CompletionRequest, card: ModelCard) -> "array[int]":
    param = "messages" if request.kind == "chat" else "prompt"
    if not tokens:
        raise InvalidRequest("the prompt is empty", param=param)
    wanted = request.max_tokens or 1
    if len(tokens) + wanted > card.context_length:
        raise ContextLengthExceeded(
            f"this model's context is {card.context_length} tokens; {len(tokens)} of prompt and {wanted} of completion are too many",
            param=param,
        )
    return tokens
