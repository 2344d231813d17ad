"""The mesh itself as a target, without HTTP: an observer that opens `complete` streams on processors."""

import asyncio
import itertools
import time
from contextlib import AsyncExitStack
from typing import Any

from meshserve.cli.bench.http_target import HttpSettings, HttpTarget
from meshserve.cli.bench.requests import Ending, Request, RequestRecord
from meshserve.cli.observing import observer, wait_for_workers
from meshserve.config import MeshConfig
from meshserve.errors import MeshserveError, PeerLost, StartupFailed, UsageError
from meshserve.mesh.calls import OutgoingCall
from meshserve.mesh.mesh import Mesh
from meshserve.wire import completion
from meshserve.wire.completion import CompletionRequest
from meshserve.wire.messages import COMPLETE

_ASK_TIMEOUT_S = 30.0


class MeshTarget:
    """Has the members of :class:`HttpTarget`."""

    def __init__(self, config: MeshConfig, settings: HttpSettings, timeout_s: float) -> None:
        self._config, self._settings, self._timeout_s = config, settings, timeout_s
        self._is_chat = settings.endpoint == "chat"
        self.name = f"mesh {config.mesh}"
        self.model = settings.model or ""
        self.is_mesh = True
        self.notes: list[str] = []
        self._policy = (settings.extra.get("meshserve") or {}).get("policy")
        if set(settings.extra) - {"meshserve"}:
            names = ", ".join(settings.extra)
            raise UsageError(f"--extra {names}: fields of HTTP requests; a mesh is asked without HTTP")
        self._stack = AsyncExitStack()
        self._ids = itertools.count(1)
        self._mesh: Mesh | None = None

    async def open(self) -> None:
        mesh = self._mesh = await self._stack.enter_async_context(observer(self._config))
        try:
            cards = await wait_for_workers(mesh)
        except StartupFailed:
            await self.close()
            raise
        self.model = self.model or (cards[0].model if cards else "")

    async def count_tokens(self, text: str) -> int | None:
        assert self._mesh is not None
        request = self._request(Request((("user", text),), 1), False)
        try:
            end = await self._mesh.call(self._processor(), COMPLETE, request, _ASK_TIMEOUT_S)
        except MeshserveError:
            return None
        return _ending_of(end, "").num_prompt_tokens

    def encode(self, request: Request, wants_receipt: bool) -> Any:
        return self._request(request, wants_receipt)

    def _request(self, request: Request, wants_receipt: bool) -> CompletionRequest:
        assert self._mesh is not None
        return CompletionRequest(
            request_id=f"{self._mesh.incarnation}-{next(self._ids)}",
            kind="chat" if self._is_chat else "completion",
            model=self.model,
            prompt=None if self._is_chat else request.prompt,
            messages=[{"role": role, "content": text} for role, text in request.messages] if self._is_chat else None,
            max_tokens=request.max_tokens,
            ignore_eos=self._settings.ignore_eos,
            wants_receipt=wants_receipt,
            policy=self._policy,
        )

    def _processor(self) -> str:
        """Each in turn. Raises PeerLost if there is none."""
        assert self._mesh is not None
        able = self._mesh.peers_with("processor")
        if not able:
            raise PeerLost("no processor is left in the mesh")
        return able[next(self._ids) % len(able)].incarnation

    def start(self, encoded: Any, record: RequestRecord) -> None:
        assert self._mesh is not None
        sink = _Sink(record)
        record.cancel = sink.cancel
        try:
            sink.call = self._mesh.open(self._processor(), COMPLETE, encoded, sink, self._timeout_s)
        except PeerLost as error:
            asyncio.get_running_loop().call_soon(sink.on_error, error)
            return
        record.sent(time.monotonic())

    async def close(self) -> None:
        await self._stack.aclose()


Target = HttpTarget | MeshTarget


class _Sink:
    """From a processor's stream to an record."""

    __slots__ = ("_record", "_texts", "call")

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        self._texts: list[str] = []
        self.call: OutgoingCall | None = None

    def on_item(self, item: str) -> None:
        if item:
            self._record.content(time.monotonic(), 1)
            if self._record.request.num_turns_left:
                self._texts.append(item)

    def on_end(self, value: completion.Ending) -> None:
        self._record.finish(time.monotonic(), _ending_of(value, "".join(self._texts)))

    def on_error(self, error: MeshserveError) -> None:
        self._record.fail(time.monotonic(), error.code)

    def cancel(self) -> None:
        """Nobody waits any more."""
        if self.call is not None:
            self.call.cancel()


def _ending_of(end: completion.Ending, text: str) -> Ending:
    return Ending(end.num_prompt_tokens, end.num_completion_tokens, end.num_cached_tokens, end.receipt, text)
