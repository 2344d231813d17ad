"""What a processor needs of each model in the mesh: its card, its tokenizer, and prompts made of requests."""

import asyncio
from array import array
from collections import OrderedDict
from typing import Any

from meshserve.engines.tokenizers.own import CHAT_TEMPLATE
from meshserve.errors import ModelNotFound, NoWorker
from meshserve.mesh.membership import Change, Member
from meshserve.mesh.mesh import Mesh
from meshserve.roles.processor.detokenizing import TokenTexts
from meshserve.roles.processor.file_cache import FileCache, cache_directory
from meshserve.roles.processor.model_files import ModelFiles
from meshserve.roles.processor.prompts import chat_of, not_empty
from meshserve.roles.processor.texts import ModelText, OwnText, ProcessText
from meshserve.wire.card import ModelCard
from meshserve.wire.completion import CompletionRequest
from meshserve.wire.hello import PeerInfo

_CHATS_COME_AFTER_S = 0.5
"""What first chats need is made ready once the peer serves, so that it does not delay that."""

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
        mesh.tasks.spawn(self._foresee_chats())

    async def _foresee_chats(self) -> None:
        await asyncio.sleep(_CHATS_COME_AFTER_S)
        await asyncio.to_thread(self._own.begin)

    def card(self, model: str) -> ModelCard:
        """Raises NoWorker if there is no decode worker at all, ModelNotFound if none serves this model."""
        for info in self._mesh.peers_serving("decode", model):
            if info.card is not None:
                return info.card
        cards = [info.card for info in self._mesh.peers_with("decode") if info.card is not None]
        if not cards:
            raise NoWorker("no decode worker is in the mesh yet")
        names = ", ".join(sorted({name for card in cards for name in card.names}))
        raise ModelNotFound(f"the model {model!r} is not served here; there are: {names}", param="model")

    def block_size(self, model: str) -> int:
        """Tokens in a KV block of its workers; 0 if there is none."""
        return next((info.layout.block_size for info in self._mesh.peers_serving("decode", model) if info.layout is not None), 0)

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

    def template(self, card: ModelCard) -> str:
        """The model's chat template, once a prompt was made with it; empty if it has none, or that was not found out."""
        text = self._texts.get((card.tokenizer, card.chat_template, card.files))
        return text.template if text is not None else card.chat_template

    # --- requests

    def encode_nowait(self, request: CompletionRequest, card: ModelCard) -> "tuple[list[array[int]], TokenTexts] | None":
        """The prompts' tokens and what tokens stand for; None if that has to wait for files or another process: :meth:`encode`.

        Raises as :meth:`encode` does.
        """
        if not _is_own(card):
            return None
        own = self._own
        if request.kind == "chat":
            chat = chat_of(request, card)
            prompts = [own.chat_nowait(chat.messages, chat.tools, **chat.variables)]
        else:
            prompts = [own.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in request.prompts]
        return not_empty(request, prompts), own.own_spelling

    async def encode(self, request: CompletionRequest, card: ModelCard) -> "tuple[list[array[int]], TokenTexts]":
        """The same for any model. To be cancelled at the request's deadline, or when nobody waits any more.

        Raises InvalidRequest for an empty prompt or a template that refuses, TokenizerFailed if the model's files cannot be had.
        """
        text = self.text(card)
        token_texts = await text.token_texts()
        if request.kind == "chat":
            chat = chat_of(request, card)
            prompts = [await text.encode_chat(chat.messages, chat.tools, **chat.variables)]
        else:
            prompts = [await text.encode(prompt) if isinstance(prompt, str) else prompt for prompt in request.prompts]
        return not_empty(request, prompts), token_texts


def _is_own(card: ModelCard) -> bool:
    """Tokenizer and template are this program's own: they need no files, and no fence."""
    return card.tokenizer == "bytes" and card.chat_template == CHAT_TEMPLATE
