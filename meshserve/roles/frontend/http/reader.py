"""From the bytes of one connection to its requests. Pure: it reads no socket and looks at no deadline."""

import time
from functools import lru_cache
from urllib.parse import unquote

import httptools

from meshserve.errors import HeaderTooLarge, InvalidRequest, MeshserveError
from meshserve.roles.frontend.http.messages import Request, body_too_large

_MAX_HEADERS = 128
_MAX_PIPELINED = 128
_MAX_PARTS_PER_READ = 4096
"""Pieces of a body in one read of 256 KiB at most: chunks of a byte each would keep the parser busy for longer than 10 ms."""
_MAX_LENGTH_DIGITS = 18


class RequestReader:
    """Feeds httptools, and is its callbacks. An error that a callback raises stops the parser at once."""

    def __init__(self, address: str, scheme: str, max_header_bytes: int, max_body_bytes: int) -> None:
        self._address, self._scheme = address, scheme
        self._max_header_bytes, self._max_body_bytes = max_header_bytes, max_body_bytes
        self._parser = httptools.HttpRequestParser(self)
        # Some clients end a body with a line break that does not belong to it: no reason to withhold the answer.
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.is_in_head = False
        """A request has begun, and the end of its head is still to come."""
        self.num_begun = 0
        """Requests, whose first byte has come."""
        self.target = b""
        self.num_body_bytes = 0
        self.request: Request | None = None
        """The one whose body is still to come."""
        self._headers: list[tuple[bytes, bytes]] = []
        self._num_read = 0
        """Bytes of this read."""
        self._num_head_read = 0
        """Of the reads since the head began: more than the head has, but known before the parser gives any of it out."""
        self._body = bytearray()
        self._num_parts = 0
        self.complete: list[Request] = []
        """Those that the last bytes completed, also where the rest of these bytes was refused."""

    def feed(self, data: bytes) -> list[Request]:
        """The requests that these bytes complete. After InvalidRequest, HeaderTooLarge or RequestTooLarge it reads no more."""
        self._num_read, self._num_parts, self.complete = len(data), 0, []
        if self.request is None:
            self._num_head_read += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # there is nothing to upgrade to: the request is served as it stands
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, MeshserveError):  # what a callback raised
                raise error.__context__ from None
            raise InvalidRequest("this is not an HTTP request") from None
        if self.is_in_head and self._num_head_read > self._max_header_bytes:
            raise self._header_too_large()
        return self.complete

    @property
    def method(self) -> str:
        """Of the request that is being read, or was refused; empty before its first line was."""
        return self._parser.get_method().decode("ascii") if self.target else ""

    def close(self) -> None:
        """Let go of the parser: it holds the reader, so that only the garbage collector could free both."""
        del self._parser

    def _header_too_large(self) -> HeaderTooLarge:
        limit = self._max_header_bytes
        return HeaderTooLarge(f"the request line and headers are longer than {limit} bytes, or more than {_MAX_HEADERS} headers")

    # --- callbacks of the parser, in the order of a request

    def on_message_begin(self) -> None:
        self.is_in_head, self.target, self._headers, self.num_body_bytes = True, b"", [], 0
        self.num_begun += 1

    def on_url(self, part: bytes) -> None:
        self.target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self._headers) >= _MAX_HEADERS:
            raise self._header_too_large()
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if max(self._num_read, self._num_head_read) > self._max_header_bytes:  # the head and more, perhaps: only now it is counted
            num_bytes = len(self.target) + sum(len(name) + len(value) + 4 for name, value in self._headers)
            if num_bytes > self._max_header_bytes:
                raise self._header_too_large()
        if len(self.complete) >= _MAX_PIPELINED:
            raise InvalidRequest("too many requests at once on one connection")
        headers = dict(reversed(self._headers))  # of a header that comes twice, the first counts
        announced = headers.get(b"content-length", b"0")
        if len(announced) > _MAX_LENGTH_DIGITS or int(announced) > self._max_body_bytes:
            raise body_too_large(self._max_body_bytes)
        path, raw_path, query = _parts_of(self.target)
        method, is_http_1_1 = self._parser.get_method().decode("ascii"), self._parser.get_http_version() == "1.1"
        keeps_alive = is_http_1_1 and self._parser.should_keep_alive()
        self.is_in_head = False
        self.request = Request(
            method, path, raw_path, query, headers, self._address, self._scheme, is_http_1_1, keeps_alive, time.monotonic()
        )

    def on_body(self, part: bytes) -> None:
        self.num_body_bytes += len(part)
        self._num_parts += 1
        if self.num_body_bytes > self._max_body_bytes:
            raise body_too_large(self._max_body_bytes)
        if self._num_parts > _MAX_PARTS_PER_READ:
            raise InvalidRequest("the body's chunks are too small")
        self._body += part

    def on_message_complete(self) -> None:
        assert self.request is not None
        if self._body:
            self.request.body, self._body = bytes(self._body), bytearray()
        self.complete.append(self.request)
        self.request, self._num_head_read = None, 0


@lru_cache(64)  # clients ask for few targets, again and again
def _parts_of(target: bytes) -> tuple[str, bytes, bytes]:
    """The path, decoded and as it came, and the query."""
    url = httptools.parse_url(target)
    path = url.path.decode("ascii")
    return unquote(path) if "%" in path else path, url.path, url.query or b""
