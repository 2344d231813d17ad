"""Any server that speaks OpenAI's API, as a target."""

import json
from dataclasses import dataclass, field
from typing import Any

from meshserve.cli.bench.http_client import (
    Pool,
    Reply,
    parse_url,
    raise_file_limit,
    request_head,
    with_body,
)
from meshserve.cli.bench.requests import PATHS, Ending, Request, RequestRecord
from meshserve.cli.bench.sse import EventReader, has_calls, json_object, text_of
from meshserve.errors import StartupFailed

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


class HttpTarget:
    """Where load goes. `notes` are what a reader of the figures should know about the target."""

    def __init__(self, url: str, settings: HttpSettings) -> None:
        self.name, self._settings = url, settings
        self._origin, self._host, self._base = parse_url(url, settings.is_checking_certificates)
        self.model = settings.model or ""
        self.is_mesh = False
        """Whether it gives receipts."""
        self.notes: list[str] = []
        self._head = self._tail = b""
        self._pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        """Open since :meth:`open`."""
        assert self._pool is not None
        return self._pool

    async def open(self) -> None:
        """Connect and find the model. Raises StartupFailed."""
        raise_file_limit()
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
        return request_head(method, self._host, self._base + path, self._settings.api_key)

    async def count_tokens(self, text: str) -> int | None:
        """Of a prompt, as the target counts them; None if it does not say."""
        request = Request((("user", text),), 1)
        body = {**self._fields(request), "model": self.model, **self._settings.extra, "stream": False}
        _, fields = await self._ask("POST", PATHS[self._settings.endpoint], body)
        return _ending_of(fields, "").num_prompt_tokens

    def _fields(self, request: Request) -> dict[str, Any]:
        if self._settings.endpoint == "chat":
            messages = [{"role": role, "content": text} for role, text in request.messages]
            return {"messages": messages, "max_tokens": request.max_tokens}
        return {"prompt": request.prompt, "max_tokens": request.max_tokens}

    def encode(self, request: Request, wants_receipt: bool) -> bytes:
        """What :meth:`start` takes: made before the request is due."""
        fields = self._fields(request)
        # later names win, and what is fixed for all requests is encoded once
        if wants_receipt:
            given = self._settings.extra.get("meshserve") or {}
            fields = {**self._fixed_fields(), **fields, "meshserve": {**given, "receipt": True}}
            return with_body(self._head, json.dumps(fields).encode())
        return with_body(self._head, json.dumps(fields).encode()[:-1] + b", " + self._tail)

    def start(self, encoded: Any, record: RequestRecord) -> None:
        """Send. Never blocks and never raises; what comes of it goes to the record, not before this returns."""
        kind = _StreamReply if self._settings.is_stream else _WholeReply
        reply = kind(record, self._settings.is_keeping_text)
        record.cancel = reply.cancel
        self.pool.start(encoded, reply)

    async def close(self) -> None:
        """End what is open."""
        if self._pool is not None:
            if count := self._pool.num_repeated:
                self.notes.append(f"{self.name} closed idle connections: {count} requests were sent again on new ones")
            await self._pool.close()

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """One request outside the measurement. Raises StartupFailed if there is no answer."""
        timeout_s = _LIST_TIMEOUT_S if body is None else _ANSWER_TIMEOUT_S
        encoded = b"" if body is None else json.dumps(body).encode()
        try:
            status, data = await self.pool.ask(with_body(self._request_head(method, path), encoded), timeout_s)
        except TimeoutError as exc:
            raise StartupFailed(f"{self.name} did not answer {path} within {timeout_s:g} s") from exc
        except ConnectionError as exc:
            raise StartupFailed(f"{self.name} cannot be asked: {exc}; {self._hint(str(exc))}") from exc
        return status, json_object(data)

    def _hint(self, kind: str) -> str:
        """A likely reason."""
        if "CERTIFICATE" in kind:
            return "--insecure does not check it"
        if kind == "connection closed" and self._origin.tls is None:
            return "does it speak https?"
        return "is it running?"


class _WholeReply(Reply):
    """From a response in one piece to an record."""

    __slots__ = ("_record",)

    def __init__(self, record: RequestRecord, is_keeping_text: bool) -> None:
        super().__init__()
        self._record = record

    def sent(self, now_s: float) -> None:
        self._record.sent(now_s)

    def failed(self, now_s: float, kind: str) -> None:
        self._record.fail(now_s, kind)

    def complete(self, now_s: float) -> None:
        if self.status == 200:
            self._succeeded(now_s)
        else:
            fields = json_object(b"".join(self.parts))
            self._record.fail(now_s, _error_kind(f"HTTP {self.status}", fields))

    def _succeeded(self, now_s: float) -> None:
        fields = json_object(b"".join(self.parts))
        text = text_of(fields)
        if text or has_calls(fields):
            self._record.content(now_s, 1)
        self._record.finish(now_s, _ending_of(fields, text))


class _StreamReply(_WholeReply):
    """From a stream of events to an record."""

    __slots__ = ("_events",)

    def __init__(self, record: RequestRecord, is_keeping_text: bool) -> None:
        super().__init__(record, is_keeping_text)
        self._events = EventReader(is_keeping_text)

    def body(self, now_s: float, data: bytes) -> None:
        if self.status != 200:
            self.parts.append(data)
        elif num_pieces := self._events.feed(data):
            self._record.content(now_s, num_pieces)

    def _succeeded(self, now_s: float) -> None:
        fields, is_ended = self._events.fields()
        if fields.get("error"):
            self._record.fail(now_s, _error_kind("stream", fields))
        elif not is_ended:
            self._record.fail(now_s, "stream cut short")
        else:
            self._record.finish(now_s, _ending_of(fields, self._events.take_text()))


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
