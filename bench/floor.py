"""The least that any way from HTTP over ZeroMQ to a worker and back can be in Python: what `bench.overhead` measures the mesh against.

A request is parsed, sent to the one worker there is, and its tokens come back; what is ready at one turn of an event loop is one
message and one write. No check of what comes in, no tokenizer, no choice of worker, no deadline, no failure, no figures.

    python -m bench.floor worker ADDRESS STEP_MS     makes tokens: one for each open stream in each step
    python -m bench.floor front ADDRESS PORT         HTTP under uvicorn, uvloop and httptools
"""

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from typing import Any

import click
import msgpack
import uvicorn
import uvloop
import zmq

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]

_MAX_READS = 100
_JSON = (b"content-type", b"application/json")
_EVENTS = [(b"content-type", b"text/event-stream")]
_MODELS = b'{"object":"list","data":[{"id":"dummy","object":"model","owned_by":"floor"}]}'
_CHUNK = 'data: {"id":"cmpl-%d","object":"text_completion","created":1790000000,"model":"dummy","choices":[{"index":0,"text":'
_CHUNK_END = ',"finish_reason":null}]}\n\n'


class Wire:
    """A socket under the running loop. What is put in at one turn leaves as one message for each peer."""

    def __init__(self, socket: "zmq.Socket[bytes]", on_batch: Callable[[bytes, list[Any]], None]) -> None:
        self._socket, self._on_batch = socket, on_batch
        self._is_router = socket.type == zmq.ROUTER
        self._waiting: dict[bytes, list[Any]] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(socket.fileno(), self._read)

    def put(self, peer: bytes, item: Any) -> None:
        """Send with all else of this turn."""
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.setdefault(peer, []).append(item)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for peer, items in waiting.items():
            frame = msgpack.packb(items)
            self._socket.send_multipart([peer, frame] if self._is_router else [frame], zmq.NOBLOCK)
        self._read()  # the descriptor only tells of changes, and sending may have swallowed one

    def _read(self) -> None:
        for _ in range(_MAX_READS):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_batch(frames[0], msgpack.unpackb(frames[-1]))
        self._loop.call_soon(self._read)


class Worker:
    """Answers [stream, wanted, prompt] with [stream, token] once a step."""

    def __init__(self, socket: "zmq.Socket[bytes]", step_s: float) -> None:
        self._step_s, self._is_stepping = step_s, False
        self._open: dict[tuple[bytes, int], int] = {}
        self._wire = Wire(socket, self._opened)
        self._loop = asyncio.get_running_loop()

    def _opened(self, peer: bytes, batch: list[Any]) -> None:
        for stream, wanted, _prompt in batch:
            self._open[peer, stream] = wanted
        if not self._is_stepping:
            self._is_stepping = True
            self._next_step()

    def _next_step(self) -> None:
        if self._step_s:
            self._loop.call_later(self._step_s, self._step)
        else:
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        left = {}
        for (peer, stream), wanted in self._open.items():
            self._wire.put(peer, (stream, 1000 + wanted))
            if wanted > 1:
                left[peer, stream] = wanted - 1
        self._open = left
        self._is_stepping = bool(left)
        if left:
            self._next_step()


class Waiting:
    """Tokens of one request that nobody took yet."""

    __slots__ = ("tokens", "woken")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.woken: asyncio.Future[None] | None = None


class Front:
    """The ASGI application."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._wire = Wire(socket, self._arrived)
        self._numbers = itertools.count(1)
        self._streams: dict[int, Waiting] = {}
        self._loop = asyncio.get_running_loop()

    def _arrived(self, _: bytes, batch: list[Any]) -> None:
        for stream, token in batch:
            waiting = self._streams[stream]
            waiting.tokens.append(token)
            if waiting.woken is not None and not waiting.woken.done():
                waiting.woken.set_result(None)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await _whole(send, _MODELS)
            return
        body, has_more = b"", True
        while has_more:
            event = await receive()
            body += event.get("body", b"")
            has_more = event.get("more_body", False)
        request = json.loads(body)
        stream = next(self._numbers)
        self._streams[stream] = Waiting()
        self._wire.put(b"", (stream, request["max_tokens"], request["prompt"]))
        try:
            answer = self._stream if request.get("stream") else self._answer
            await answer(send, stream, request["max_tokens"])
        finally:
            del self._streams[stream]

    async def _tokens(self, waiting: Waiting) -> list[int]:
        while not waiting.tokens:
            waiting.woken = self._loop.create_future()
            await waiting.woken
        tokens, waiting.tokens = waiting.tokens, []
        return tokens

    async def _stream(self, send: Send, stream: int, num_left: int) -> None:
        head, waiting = _CHUNK % stream, self._streams[stream]
        is_first = True
        while num_left:
            tokens = await self._tokens(waiting)
            num_left -= len(tokens)
            if is_first:
                is_first = False
                await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
            out = "".join([f'{head}" t{token}"{_CHUNK_END}' for token in tokens]) + ("" if num_left else "data: [DONE]\n\n")
            await send({"type": "http.response.body", "body": out.encode(), "more_body": num_left > 0})

    async def _answer(self, send: Send, stream: int, num_wanted: int) -> None:
        tokens: list[int] = []
        while len(tokens) < num_wanted:
            tokens += await self._tokens(self._streams[stream])
        text = "".join([f" t{token}" for token in tokens])
        usage = {"completion_tokens": num_wanted}
        await _whole(send, json.dumps({"id": f"cmpl-{stream}", "choices": [{"index": 0, "text": text}], "usage": usage}).encode())


async def _whole(send: Send, body: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [_JSON, (b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@click.group()
def main() -> None:
    """The floor's two processes."""


@main.command()
@click.argument("address")
@click.argument("step_ms", type=float)
def worker(address: str, step_ms: float) -> None:
    """Make tokens until killed."""

    async def serve(socket: "zmq.Socket[bytes]") -> None:
        Worker(socket, step_ms / 1000)
        await asyncio.Event().wait()

    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(address)
        uvloop.run(serve(socket))


@main.command()
@click.argument("address")
@click.argument("port", type=int)
def front(address: str, port: int) -> None:
    """Answer HTTP until told to stop."""

    async def serve(socket: "zmq.Socket[bytes]") -> None:
        settings: dict[str, Any] = {"loop": "none", "http": "httptools", "lifespan": "off", "log_level": "warning", "access_log": False}
        await uvicorn.Server(uvicorn.Config(Front(socket), port=port, **settings)).serve()

    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(address)
        uvloop.run(serve(socket))


if __name__ == "__main__":
    main()
