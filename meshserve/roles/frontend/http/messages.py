"""HTTP requests and responses, as handlers see them. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from meshserve.errors import RequestTooLarge

Header = tuple[bytes, bytes]

JSON = b"content-type: application/json\r\n"
_FORBIDDEN = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class Account(Protocol):
    """What a request came to, as the request log tells: whoever answers the request keeps it."""

    outcome: str
    """`ok`, or the code of the error that the request ended in."""
    model: str
    request_id: str
    client_id: str


@dataclass(slots=True, eq=False)
class PlainAccount:
    """Of a request that is no completion."""

    outcome: str = "ok"
    model: str = ""
    request_id: str = ""
    client_id: str = ""


_NOTHING_SAID = PlainAccount()
"""Shared by all requests of which nobody said more."""


@dataclass(slots=True)
class Request:
    """One request. Of a header that comes twice, the first counts."""

    method: str
    path: str
    """Decoded and without the query: what the guard and the routes look at."""
    raw_path: bytes
    query: bytes
    headers: Mapping[bytes, bytes]
    """By name in lower case."""
    address: str
    """Of the client."""
    scheme: str
    takes_chunks: bool
    """False for a client that speaks HTTP/1.0."""
    keeps_alive: bool
    began_s: float
    """When the head was complete, on the monotonic clock."""
    body: bytes = b""
    coding: str = ""
    """In which `body` is compressed; empty: it is not."""
    is_expected: bool = False
    """The guard has looked at the head, and the client may send the body."""
    name: str = ""
    """What stands in the path where the route leaves it open."""
    client: str = ""
    """For the fairness between clients: the key, else the address. The guard sets it."""
    owner: bytes = b""
    """Whose what is kept for this client is; empty without keys. The guard sets it."""
    extra_headers: bytes = b""
    """Of every response to this request, as :func:`header_lines` gives them. The guard sets them, and a handler may add some."""
    route: str = ""
    """The row of the table of routes that answers it; empty if none did."""
    status: int = 0
    """Of the response, once its head is settled."""
    account: Account = _NOTHING_SAID
    ending: Any = None
    """Of a completion: the answer's end, with the numbers of its tokens."""

    def failed(self, code: str) -> None:
        """The request ended in this error."""
        if self.account is _NOTHING_SAID:
            self.account = PlainAccount(code)
        else:
            self.account.outcome = code


@dataclass(frozen=True, slots=True)
class Response:
    """One response, whole."""

    status: int
    body: bytes = b""
    headers: bytes = b""
    """As :func:`header_lines` gives them; the connection adds date and length."""


def header_lines(headers: Sequence[Header]) -> bytes:
    """Headers as they stand in a response's head. Raises RuntimeError for a value with a control character."""
    if _FORBIDDEN.search(b"".join([value for _, value in headers])):
        raise RuntimeError("a header with a control character")
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def body_too_large(max_bytes: int) -> RequestTooLarge:
    """The error, in one wording for all limits of bodies."""
    return RequestTooLarge(f"the body is longer than {max_bytes} bytes")


def takes_encoding(accepted: bytes, encoding: bytes) -> bool:
    """Whether `accept-encoding` names this encoding, with a weight that is not 0 (RFC 9110, section 12.5.3)."""
    for part in accepted.lower().split(b","):
        name, _, weight = part.partition(b";")
        if name.strip() == encoding:
            return re.fullmatch(rb"\s*q=0(\.0*)?\s*", weight) is None
    return False
