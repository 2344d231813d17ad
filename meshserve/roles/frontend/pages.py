"""Pages of the frontend's own: their files, and the headers that keep everything else out of them."""

import functools
from pathlib import Path

from meshserve.roles.frontend.http.messages import Response, header_lines

_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".svg": b"image/svg+xml",
}
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    b"base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY),
    (b"cache-control", b"no-cache"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


@functools.cache
def _files(folder: Path) -> dict[str, Response]:
    """Read once, by the names that are there and no others."""
    heads = {suffix: header_lines([(b"content-type", kind), *_HEADERS]) for suffix, kind in _TYPES.items()}
    return {path.name: Response(200, path.read_bytes(), heads[path.suffix]) for path in folder.iterdir() if path.suffix in heads}


def page_file(folder: Path, name: str) -> Response:
    """The file of this name as a response; 404 if there is none."""
    missing = Response(404, f"there is no {name[:64]} here\n".encode(), b"content-type: text/plain; charset=utf-8\r\n")
    return _files(folder).get(name, missing)
