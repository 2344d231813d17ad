"""Compressed bodies (RFC 9110, section 8.4): the supported codings, and their limits. Pure.
"""

import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from meshserve.errors import InvalidRequest, UnsupportedCoding
from meshserve.roles.frontend.http.messages import body_too_large

CODINGS = ("gzip", "zstd")
_MAX_MEMBERS = 64
"""Of one body. An empty one takes 8 bytes, and as much time as a long one to begin with."""
_WINDOW_LOG_MAX = 23
"""8 MiB: what RFC 9659 lets a sender use. The frame's header names its window, and so the memory
that it costs.
"""


def coding_of(values: Sequence[bytes]) -> str:
    """The one coding of a body by all its `Content-Encoding` headers; empty for none. Raises
    UnsupportedCoding.
    """
    named = [name.strip() for name in b",".join(values).decode("latin-1").lower().split(",")]
    codings = [name.removeprefix("x-") for name in named if name not in ("", "identity")]
    if len(codings) > 1 or not set(codings) <= set(CODINGS):
        raise UnsupportedCoding(
            f"a body comes plain or with one of the codings {', '.join(CODINGS)}"
        )
    return codings[0] if codings else ""


def inflated(body: bytes, coding: str, max_bytes: int) -> bytes:
    """The decompressed body.

    Raises RequestTooLarge as soon as there are more than `max_bytes` of it, InvalidRequest for
    what is not of this coding.
    """
    begin = _decompressors()[coding]
    found = bytearray()
    for _ in range(_MAX_MEMBERS):
        decompressor = begin()
        try:
            # one byte more than fits tells a body that is too long, however much it would come to
            found += decompressor.decompress(body, max_bytes + 1 - len(found))
        except Exception as error:  # each library has its own
            raise InvalidRequest(f"the body is not {coding}") from error
        if len(found) > max_bytes:
            raise body_too_large(max_bytes)
        if not decompressor.eof:
            raise InvalidRequest(f"the body ends before its {coding} does")
        body = decompressor.unused_data
        if not body:
            return bytes(found)
    raise InvalidRequest(f"the body is more than {_MAX_MEMBERS} pieces of {coding}")


def _decompressors() -> dict[str, Callable[[], Any]]:
    """What begins to read one piece, by coding. The library of zstd is loaded for the first body
    that needs it.
    """

    def begin_zstd() -> Any:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
        return zstd.ZstdDecompressor(
            options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX}
        )

    return {"gzip": lambda: zlib.decompressobj(zlib.MAX_WBITS | 16), "zstd": begin_zstd}
