"""From the bytes of one connection to its requests. Pure: it reads no socket and looks at no deadline."""

import time
from functools import lru_cache
from urllib.parse import unquote

import httptools

from meshserve.errors import HeaderTooLarge, InvalidRequest, MeshserveError
from meshserve.roles.frontend.http.codings import coding_of
from meshserve.roles.frontend.http.forwarded import TrustedProxies, scheme_of
from meshserve.roles.frontend.http.messages import Request, body_too_large

_MAX_HEADERS = 128
_MAX_PIPELINED = 128
_MAX_PARTS_PER_READ = 4096
"""Pieces of a body in one read of 256 KiB at most: chunks of a byte each would keep the parser busy for longer than 10 ms."""
_MAX_LENGTH_DIGITS = 18
_FRAMING = (b"content-length", b"transfer-encoding")
"""Headers that say where a body ends."""


class RequestReader:
    """Feeds httptools, and is its callbacks. An error that a callback raises stops the parser at once."""

    def __init__(
        self,
        address: str,
        scheme: str,
        max_header_bytes: int,
        max_body_bytes: int,
        root_path: str = "",
        proxies: TrustedProxies | None = None,
    ) -> None:
        """`proxies` are those that may speak for others; None if the client at `address` is none of them."""
        self._address, self._scheme, self._root_path, self._proxies = address, scheme, root_path, proxies
        self._max_header_bytes, self._max_body_bytes = max_header_bytes, max_body_bytes
        self._parser = _parser_for(self)
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
        self._asks_upgrade = False
        """Another protocol is asked for: the parser takes what follows the head for that, and not for a body."""
        self._body = bytearray()
        self._num_parts = 0
        self.complete: list[Request] = []
        """Those that the last bytes completed, also where the rest of these bytes was refused."""

    def feed(self, data: bytes) -> list[Request]:
        """The requests that these bytes complete. After InvalidRequest, HeaderTooLarge, RequestTooLarge or UnsupportedCoding it reads
        no more."""
        self._num_read, self._num_parts, self.complete = len(data), 0, []
        if self.request is None:
            self._num_head_read += len(data)
        is_read = False
        while not is_read:
            try:
                self._parser.feed_data(data)
                is_read = True
            except httptools.HttpParserUpgrade as upgrade:
                # There is nothing to upgrade to: the request is served as it stands, and so are
                # those that follow (RFC 9110, section 7.8).
                data = data[upgrade.args[0] :]
                self._go_on_behind_head()
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

    @property
    def path(self) -> str:
        """The same request's, as it came and below the root path; perhaps cut short."""
        path = self.target.partition(b"?")[0].decode("latin-1")
        return path.removeprefix(self._root_path) if path.startswith(self._root_path + "/") else path

    def _go_on_behind_head(self) -> None:
        """Have a parser read on that is told of the same body, and of no upgrade."""
        assert self.request is not None, "its head was read"
        self._asks_upgrade = False
        # the method says nothing of where a body ends, and CONNECT would be taken for an upgrade again
        line = f"POST / HTTP/{'1.1' if self.request.takes_chunks else '1.0'}\r\n"
        framing = [b"%b: %b\r\n" % header for header in self._headers if header[0] in _FRAMING]
        head = b"%b%b\r\n" % (line.encode(), b"".join(framing))
        self._parser = _BodyReader(self).parser_after(head)

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
        if b"host" not in headers or len(headers) < len(self._headers):
            self._check_hosts()
        announced = headers.get(b"content-length", b"0")
        if len(announced) > _MAX_LENGTH_DIGITS or int(announced) > self._max_body_bytes:
            raise body_too_large(self._max_body_bytes)
        path, raw_path, query = _parts_of(self.target, self._root_path)
        method, is_http_1_1 = self._parser.get_method().decode("ascii"), self._parser.get_http_version() == "1.1"
        keeps_alive = is_http_1_1 and self._parser.should_keep_alive()
        self.is_in_head = False
        self.request = Request(
            method, path, raw_path, query, headers, self._address, self._scheme, is_http_1_1, keeps_alive, time.monotonic()
        )
        if b"content-encoding" in headers:
            self.request.coding = coding_of(self._values(b"content-encoding"))
        if self._proxies is not None:
            self.request.address = self._proxies.client(self._address, self._values(b"x-forwarded-for"))
            self.request.scheme = scheme_of(self._values(b"x-forwarded-proto"), self._scheme)
        if b"upgrade" in headers or method == "CONNECT":  # the parser takes that for an upgrade, whatever its headers say
            self._asks_upgrade = self._parser.should_upgrade()

    def _values(self, name: bytes) -> list[bytes]:
        """Of all headers of this name."""
        return [value for other, value in self._headers if other == name]

    def _check_hosts(self) -> None:
        """One `Host`, and no other; HTTP/1.0 may do without (RFC 9112, section 3.2)."""
        num_hosts = len(self._values(b"host"))
        if num_hosts > 1 or (not num_hosts and self._parser.get_http_version() == "1.1"):
            raise InvalidRequest("a request names its host once, in a header `Host`")

    def on_body(self, part: bytes) -> None:
        self.num_body_bytes += len(part)
        self._num_parts += 1
        if self.num_body_bytes > self._max_body_bytes:
            raise body_too_large(self._max_body_bytes)
        if self._num_parts > _MAX_PARTS_PER_READ:
            raise InvalidRequest("the body's chunks are too small")
        self._body += part

    def on_message_complete(self) -> None:
        if self._asks_upgrade:
            return  # its body is still to be read
        assert self.request is not None
        if self._body:
            self.request.body, self._body = bytes(self._body), bytearray()
        self.complete.append(self.request)
        self.request, self._num_head_read = None, 0


class _BodyReader:
    """Callbacks of a parser that begins within a request: the request's head, which the parser has to be told, is known."""

    def __init__(self, reader: RequestReader) -> None:
        self._reader = reader
        self._is_known = True
        self.on_body, self.on_message_complete = reader.on_body, reader.on_message_complete

    def parser_after(self, head: bytes) -> httptools.HttpRequestParser:
        """A parser that goes on behind this head."""
        parser = _parser_for(self)
        parser.feed_data(head)
        self._is_known = False
        return parser

    def on_message_begin(self) -> None:
        if not self._is_known:
            self._reader.on_message_begin()

    def on_url(self, part: bytes) -> None:
        if not self._is_known:
            self._reader.on_url(part)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_known:
            self._reader.on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self._is_known:
            self._reader.on_headers_complete()


def _parser_for(callbacks: RequestReader | _BodyReader) -> httptools.HttpRequestParser:
    parser = httptools.HttpRequestParser(callbacks)
    # Some clients end a body with a line break that does not belong to it: no reason to withhold the answer.
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


@lru_cache(64)  # clients ask for few targets, again and again
def _parts_of(target: bytes, root_path: str) -> tuple[str, bytes, bytes]:
    """The path, decoded and as it came, and the query; without the root path, which a proxy may leave in or take away."""
    url = httptools.parse_url(target)
    raw_path, path = url.path, url.path.decode("ascii")
    if root_path and (path == root_path or path.startswith(root_path + "/")):
        raw_path, path = raw_path[len(root_path) :], path[len(root_path) :]
    return unquote(path) if "%" in path else path, raw_path, url.query or b""
