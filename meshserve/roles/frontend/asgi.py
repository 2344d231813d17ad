"""The few things that every part of the frontend does with ASGI."""

import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from meshserve.errors import MeshserveError, RequestTooLarge

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON: Header = (b"content-type", b"application/json")


class ClientGone(Exception):  # never leaves the frontend: there is nobody to tell
    """The client closed its connection."""


def body_too_large(max_bytes: int) -> RequestTooLarge:
    """The error, in one wording for all who find out."""
    return RequestTooLarge(f"the body is longer than {max_bytes} bytes")


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """The whole body. Raises RequestTooLarge, or ClientGone."""
    parts, size_bytes = [], 0
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise ClientGone
        part = event.get("body", b"")
        size_bytes += len(part)
        if size_bytes > max_bytes:
            raise body_too_large(max_bytes)
        parts.append(part)
        if not event.get("more_body", False):
            return b"".join(parts)


async def send_whole(send: Send, status: int, body: bytes, headers: list[Header]) -> None:
    """A response in one piece."""
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_headers(error: MeshserveError) -> list[Header]:
    """Of an error response: its type, and when to come back if that is known."""
    retry_after_s = getattr(error, "retry_after_s", 1.0) if error.http_status in (429, 503) else None
    return [JSON] + ([(b"retry-after", str(max(1, math.ceil(retry_after_s))).encode())] if retry_after_s is not None else [])
