"""From the bytes of one connection to its requests. Pure: it reads no socket and looks at no deadline."""

import time
from urllib.parse import unquote

import httptools

from meshserve.errors import HeaderTooLarge, InvalidRequest, MeshserveError
from meshserve.roles.frontend.http.deadlines import Stage
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
        self.stage = Stage.IDLE
        """What the reader waits for: IDLE (the first byte of a request), HEAD or BODY."""
        self.target = b""
        self.num_body_bytes = 0
        self.request: Request | None = None
        """The one whose body is still to come."""
        self._headers: dict[bytes, bytes] = {}
        self._num_headers = self._head_bytes = 0
        self._read_bytes = 0
        """Of the reads since the head began: more than the head has, but known before the parser gives any of it out."""
        self._body = bytearray()
        self._num_parts = 0
        self._complete: list[Request] = []

    def feed(self, data: bytes) -> list[Request]:
        """The requests that these bytes complete. After InvalidRequest, HeaderTooLarge or RequestTooLarge it reads no more."""
        self._num_parts = 0
        self._complete = []
        if self.stage is not Stage.BODY:
            self._read_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # there is nothing to upgrade to: the request is served as it stands
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, MeshserveError):  # what a callback raised
                raise error.__context__ from None
            raise InvalidRequest("this is not an HTTP request") from None
        if self.stage is Stage.HEAD and self._read_bytes > self._max_header_bytes:
            raise self._header_too_large()
        return self._complete

    def close(self) -> None:
        """Let go of the parser: it holds the reader, so that only the garbage collector could free both."""
        del self._parser

    def _header_too_large(self) -> HeaderTooLarge:
        limit = self._max_header_bytes
        return HeaderTooLarge(f"the request line and headers are longer than {limit} bytes, or more than {_MAX_HEADERS} headers")

    # --- callbacks of the parser, in the order of a request

    def on_message_begin(self) -> None:
        self.stage, self.target, self._headers = Stage.HEAD, b"", {}
        self._num_headers = self._head_bytes = self.num_body_bytes = 0

    def on_url(self, part: bytes) -> None:
        self.target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._head_bytes += len(name) + len(value) + 4
        if self._num_headers > _MAX_HEADERS:
            raise self._header_too_large()
        if self.stage is Stage.HEAD:  # what follows a body is no header that anything here asks for
            self._headers.setdefault(name.lower(), value)

    def on_headers_complete(self) -> None:
        if self._head_bytes + len(self.target) > self._max_header_bytes:
            raise self._header_too_large()
        if len(self._complete) >= _MAX_PIPELINED:
            raise InvalidRequest("too many requests at once on one connection")
        announced = self._headers.get(b"content-length", b"0")
        if len(announced) > _MAX_LENGTH_DIGITS or int(announced) > self._max_body_bytes:
            raise body_too_large(self._max_body_bytes)
        url = httptools.parse_url(self.target)
        parser, path = self._parser, url.path.decode("ascii")
        is_http_1_1 = parser.get_http_version() == "1.1"
        self.stage = Stage.BODY
        self.request = Request(
            method=parser.get_method().decode("ascii"),
            path=unquote(path) if "%" in path else path,
            raw_path=url.path,
            query=url.query or b"",
            headers=self._headers,
            address=self._address,
            scheme=self._scheme,
            takes_chunks=is_http_1_1,
            keeps_alive=is_http_1_1 and parser.should_keep_alive(),
            began_s=time.monotonic(),
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
        self._complete.append(self.request)
        self.request, self.stage, self._read_bytes = None, Stage.IDLE, 0
