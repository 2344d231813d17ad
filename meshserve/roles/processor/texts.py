"""The text side of one model: its vocabulary, and the way from texts and chats to tokens."""

import asyncio
import logging
import time
from array import array
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from meshserve.engines.tokenizers import ByteTokenizer
from meshserve.engines.tokenizers.own import CHAT_TEMPLATE
from meshserve.engines.tokenizers.table import TokenTable
from meshserve.errors import MeshserveError, TokenizerFailed
from meshserve.mesh.tasks import TaskOwner
from meshserve.roles.processor.detokenizing import TokenTexts
from meshserve.roles.processor.templating import render_chat
from meshserve.roles.processor.text_process import TextProcess, load_request
from meshserve.wire.card import ModelCard

Chat = tuple[Sequence[Mapping[str, Any]], Sequence[Any] | None, dict[str, Any]]
"""Messages, tools if there are any, and what else the chat template may use."""
LONG_CHARACTERS = 65_536
"""Longer texts (15 ms and more) take a process of their own, so that short ones need not wait behind them."""
_UNFETCHED_FOR_S, _UNUSABLE_FOR_S = 1.0, 30.0
"""A model whose files nobody gave out, or are of no use, is not tried again for so long: finding out takes up to 30 s of processor time."""
_log = logging.getLogger(__name__)


class ModelText:
    """What a processor does to a model's text: here the dummy model's, with this program's own tokenizer and
    template, in this process. `tokenizer`, `own_texts` and `chat_nowait` are for callers that cannot wait.
    """

    def __init__(self) -> None:
        self.tokenizer = ByteTokenizer()
        self.own_texts = TokenTexts(self.tokenizer)

    def begin(self) -> None:
        """Make ready what a first request would have to wait for: importing the template's language takes
        50 ms, beside the event loop or in the first chat's time.
        """
        render_chat(CHAT_TEMPLATE, ())

    def chat_nowait(self, chat: Chat) -> "array[int]":
        """The tokens of a chat in this program's own template."""
        messages, tools, variables = chat
        return self.tokenizer.encode(render_chat(CHAT_TEMPLATE, messages, tools, **variables))

    async def token_texts(self) -> TokenTexts:
        """What tokens stand for."""
        return self.own_texts

    async def encode(self, text: str) -> "array[int]":
        """A text's tokens, with what the model wants around it."""
        return self.tokenizer.encode(text)

    async def encode_chat(self, chat: Chat) -> "array[int]":
        """The tokens of a chat, rendered by the model's own template.

        Raises InvalidRequest if the template refuses the chat or exceeds its limits.
        """
        return self.chat_nowait(chat)

    async def decode(self, tokens: "array[int]") -> str:
        """The text that these tokens are, with nothing before them and special ones left out."""
        return self.tokenizer.decode(tokens)


class ProcessText(ModelText):
    """Another peer's template and tokenizer, in processes of their own. Loaded once, whoever asks first.

    Every method but `begin` and `close` raises TokenizerFailed if the tokenizer cannot be had.
    """

    def __init__(self, tasks: TaskOwner, get_files: Callable[[], Awaitable[Mapping[str, bytes]]], card: ModelCard) -> None:
        self._tasks, self._get_files, self._card = tasks, get_files, card
        self._loading: asyncio.Task[None] | None = None
        self._failure: MeshserveError | None = None
        self._fails_until = 0.0
        self._token_texts: TokenTexts | None = None
        self._processes: dict[bool, TextProcess] = {}
        """For texts that are not long, and for those that are."""
        self.template = ""
        """For chats with tools; known once it is loaded."""

    @property
    def is_idle(self) -> bool:
        """Nobody waits for it."""
        return all(process.is_idle for process in self._processes.values()) and (self._loading is None or self._loading.done())

    def begin(self) -> None:
        """Start loading, unless that was done or failed a moment ago."""
        has_failed = self._failure is not None and time.monotonic() < self._fails_until
        if self._loading is None or (self._loading.done() and self._token_texts is None and not has_failed):
            self._failure = None
            self._loading = self._tasks.spawn(self._load())

    async def _process_for(self, length: int) -> TextProcess:
        await self.token_texts()
        return self._processes[length > LONG_CHARACTERS]

    async def token_texts(self) -> TokenTexts:
        if self._token_texts is None:
            self.begin()
            assert self._loading is not None
            await asyncio.wait([self._loading])  # shared: who stops waiting does not stop it
            if self._token_texts is None:
                raise self._failure or TokenizerFailed("this peer is stopping")
        return self._token_texts

    async def _load(self) -> None:
        failed_for_s = _UNFETCHED_FOR_S
        try:
            files = await self._get_files()
            failed_for_s = _UNUSABLE_FOR_S
            request = await asyncio.to_thread(load_request, self._card.tokenizer, files, self._card.chat_template)
            self._processes = {is_long: TextProcess(self._tasks, request) for is_long in (False, True)}
            self.template = (await self._processes[False].ask("template")).decode("utf-8", "replace")
            table = self._processes[False].table
            self._token_texts = TokenTexts(TokenTable.from_bytes(table) if table else ByteTokenizer())
        except MeshserveError as error:
            _log.warning("the tokenizer of the model %s cannot be had: %s", self._card.model, error.message)
            self._failure, self._fails_until = error, time.monotonic() + failed_for_s

    async def encode(self, text: str) -> "array[int]":
        process = await self._process_for(len(text))
        return array("I", await process.ask("encode", text, True))

    async def encode_chat(self, chat: Chat) -> "array[int]":
        messages, _, _ = chat
        process = await self._process_for(sum(len(message["content"]) for message in messages))
        return array("I", await process.ask("chat", *chat))

    async def decode(self, tokens: "array[int]") -> str:
        process = await self._process_for(len(tokens))
        return (await process.ask("decode", tokens.tobytes())).decode("utf-8", "replace")

    async def close(self) -> None:
        """End the processes. Callers that wait get an error."""
        if self._loading is not None:
            self._loading.cancel()
        for process in self._processes.values():
            await process.close()
