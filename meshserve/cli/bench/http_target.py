"""Any server that speaks OpenAI's API, as a target."""

import asyncio
import json
import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from meshserve.cli.bench.choices import PATHS
from meshserve.cli.bench.exchange import Ending, Exchange, Job
from meshserve.cli.bench.http_client import Connection, Origin, Pool, ask_for_files
from meshserve.cli.bench.sse import EventReader, text_of
from meshserve.errors import StartupFailed, UsageError

_LIST_TIMEOUT_S, _ANSWER_TIMEOUT_S = 30.0, 120.0
"""For the models, and for one token of a server that may have to load its model first."""


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """How requests look."""

    endpoint: str = "completions"
    model: str | None = None
    api_key: str | None = None
    is_stream: bool = True
    ignore_eos: bool = False
    is_keeping_text: bool = False
    """For conversations: later turns need what was answered."""
    is_checking_certificates: bool = True
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields of the body."""


def parse_url(url: str, is_checking_certificates: bool = True) -> tuple[Origin, str, str]:
    """Where to connect, the `host` header, and what comes before `/v1/...`. Raises UsageError."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query:
        raise UsageError(f"{url!r} is no URL of a server: http://HOST:PORT")
    if "@" in parts.netloc:
        raise UsageError("no name or password in a URL, as it is shown with the figures: --api-key")
    tls = None
    if parts.scheme == "https":
        tls = ssl.create_default_context()
        if not is_checking_certificates:
            tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    base = parts.path.rstrip("/")
    for ending in (*PATHS.values(), "/v1"):
        base = base.removesuffix(ending)
    return Origin(parts.hostname, port or (443 if tls else 80), tls), parts.netloc, base


class HttpTarget:
    """See :class:`meshserve.cli.bench.exchange.Target`."""

    def __init__(self, url: str, settings: HttpSettings) -> None:
        self.name, self._settings = url, settings
        self._origin, self._host, self._base = parse_url(url, settings.is_checking_certificates)
        self.model = settings.model or ""
        self.is_mesh = False
        self.notes: list[str] = []
        self._head = self._tail = b""
        self._pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        """Open since :meth:`open`."""
        assert self._pool is not None
        return self._pool

    async def open(self) -> None:
        ask_for_files()
        self._pool = Pool(self._origin)
        status, fields = await self._ask("GET", "/v1/models")
        listed = fields.get("data")
        models = [entry for entry in listed if isinstance(entry, dict) and entry.get("id")] if isinstance(listed, list) else []
        if status == 401:
            raise StartupFailed(f"{self.name} asks for an API key, or another one: --api-key")
        if not self.model:
            if not models:
                raise StartupFailed(f"{self.name} names no model at /v1/models (HTTP {status}): --model")
            self.model = str(models[0]["id"])
        self.is_mesh = any(entry.get("owned_by") == "meshserve" for entry in models)
        self._head = self._request_head("POST", PATHS[self._settings.endpoint])
        self._tail = json.dumps(self._fixed_fields()).encode()[1:]

    def _fixed_fields(self) -> dict[str, Any]:
        settings = self._settings
        fields: dict[str, Any] = {"model": self.model, "stream": settings.is_stream}
        if settings.is_stream:
            fields["stream_options"] = {"include_usage": True}
        if settings.ignore_eos:
            fields["ignore_eos"] = True
        return {**fields, **settings.extra}

    def _request_head(self, method: str, path: str) -> bytes:
        lines = [
            f"{method} {self._base}{path} HTTP/1.1",
            f"host: {self._host}",
            "user-agent: meshserve-bench",
            "content-type: application/json",
        ]
        if self._settings.api_key:
            lines.append(f"authorization: Bearer {self._settings.api_key}")
        return "\r\n".join([*lines, "content-length: "]).encode()

    async def count_tokens(self, text: str) -> int | None:
        job = Job((("user", text),), 1)
        body = {**self._fields(job), "model": self.model, **self._settings.extra, "stream": False}
        _, fields = await self._ask("POST", PATHS[self._settings.endpoint], body)
        return _ending_of(fields, "").num_prompt_tokens

    def _fields(self, job: Job) -> dict[str, Any]:
        if self._settings.endpoint == "chat":
            messages = [{"role": role, "content": text} for role, text in job.messages]
            return {"messages": messages, "max_tokens": job.max_tokens}
        return {"prompt": job.prompt, "max_tokens": job.max_tokens}

    def encode(self, job: Job, wants_receipt: bool) -> bytes:
        fields = self._fields(job)
        if wants_receipt:
            given = self._settings.extra.get("meshserve")
            # later names win, so that what is fixed for all requests need not be encoded again
            body = json.dumps({**json.loads(b"{" + self._tail), **fields, "meshserve": {**(given or {}), "receipt": True}}).encode()
        else:
            body = json.dumps(fields).encode()[:-1] + b", " + self._tail
        return b"%b%d\r\n\r\n%b" % (self._head, len(body), body)

    def start(self, encoded: Any, exchange: Exchange) -> None:
        reply = _StreamReply(exchange, self._settings) if self._settings.is_stream else _WholeReply(exchange)
        exchange.cancel = reply.cancel
        self.pool.start(encoded, reply)

    async def close(self) -> None:
        if self._pool is not None:
            if self._pool.num_repeated:
                self.notes.append(f"{self.name} closed idle connections: {self._pool.num_repeated} requests were sent again on new ones")
            await self._pool.close()

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """One request outside the measurement. Raises StartupFailed if there is no answer."""
        encoded = json.dumps(body).encode() if body is not None else b""
        timeout_s = _LIST_TIMEOUT_S if body is None else _ANSWER_TIMEOUT_S
        reply = _Answer()
        self.pool.start(b"%b%d\r\n\r\n%b" % (self._request_head(method, path), len(encoded), encoded), reply)
        try:
            async with asyncio.timeout(timeout_s):
                data = await reply.ended
        except TimeoutError as exc:
            raise StartupFailed(f"{self.name} did not answer {path} within {timeout_s:g} s") from exc
        except ConnectionError as exc:
            raise StartupFailed(f"{self.name} cannot be asked: {exc}; {self._hint(str(exc))}") from exc
        return reply.status, _object(data)

    def _hint(self, kind: str) -> str:
        """What it may be."""
        if "CERTIFICATE" in kind:
            return "--insecure does not check it"
        if kind == "connection closed" and self._origin.tls is None:
            return "does it speak https?"
        return "is it running?"


class _Answer:
    """A reply that is waited for."""

    def __init__(self) -> None:
        self.status = 0
        self._parts: list[bytes] = []
        self.ended: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def sent(self, now_s: float, connection: Connection) -> None:
        """Nothing to note."""

    def head(self, status: int) -> None:
        self.status = status

    def body(self, now_s: float, data: bytes) -> None:
        self._parts.append(data)

    def complete(self, now_s: float) -> None:
        if not self.ended.done():
            self.ended.set_result(b"".join(self._parts))

    def failed(self, now_s: float, kind: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError(kind))


class _Reply:
    """From a response to an exchange."""

    __slots__ = ("_connection", "_exchange", "_is_cancelled", "_parts", "_status")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._connection: Connection | None = None
        self._is_cancelled = False
        self._status = 0
        self._parts: list[bytes] = []

    def sent(self, now_s: float, connection: Connection) -> None:
        self._connection = connection
        if self._is_cancelled:
            connection.discard()
        else:
            self._exchange.sent(now_s)

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._is_cancelled = True
        if self._connection is not None:
            self._connection.discard()

    def head(self, status: int) -> None:
        self._status = status

    def body(self, now_s: float, data: bytes) -> None:
        self._parts.append(data)

    def failed(self, now_s: float, kind: str) -> None:
        self._connection = None
        self._exchange.fail(now_s, kind)

    def complete(self, now_s: float) -> None:
        self._connection = None
        if self._status == 200:
            self.succeeded(now_s)
        else:
            self._exchange.fail(now_s, _error_kind(f"HTTP {self._status}", _object(b"".join(self._parts))))

    def succeeded(self, now_s: float) -> None:
        """The whole of a response with status 200 is there."""
        raise AssertionError("each kind of reply says what follows")


class _WholeReply(_Reply):
    """An answer in one piece."""

    __slots__ = ()

    def succeeded(self, now_s: float) -> None:
        fields = _object(b"".join(self._parts))
        text = text_of(fields)
        if text:
            self._exchange.content(now_s, 1)
        self._exchange.finish(now_s, _ending_of(fields, text))


class _StreamReply(_Reply):
    """A stream of events."""

    __slots__ = ("_events", "_is_keeping")

    def __init__(self, exchange: Exchange, settings: HttpSettings) -> None:
        super().__init__(exchange)
        self._is_keeping = settings.is_keeping_text
        self._events = EventReader(settings.is_keeping_text)

    def body(self, now_s: float, data: bytes) -> None:
        if self._status != 200:
            self._parts.append(data)
        elif num_pieces := self._events.feed(data):
            self._exchange.content(now_s, num_pieces)

    def succeeded(self, now_s: float) -> None:
        fields, is_ended = self._events.fields()
        if fields.get("error"):
            self._exchange.fail(now_s, _error_kind("stream", fields))
        elif not is_ended:
            self._exchange.fail(now_s, "stream cut short")
        else:
            self._exchange.finish(now_s, _ending_of(fields, self._events.text() if self._is_keeping else ""))


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _error_kind(where: str, fields: dict[str, Any]) -> str:
    error = fields.get("error")
    code = (error.get("code") or error.get("type")) if isinstance(error, dict) else None
    return f"{where} {code}" if code else where


def _ending_of(fields: dict[str, Any], text: str) -> Ending:
    usage = fields.get("usage") if isinstance(fields.get("usage"), dict) else {}
    assert isinstance(usage, dict)
    details = usage.get("prompt_tokens_details")
    receipt = fields.get("meshserve")
    return Ending(
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        _count(details.get("cached_tokens")) if isinstance(details, dict) else None,
        receipt if isinstance(receipt, dict) else None,
        text,
    )


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
