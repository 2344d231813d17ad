"""Pages of the frontend's own: their files, and the headers that keep everything else out of them."""

from pathlib import Path

from starlette.responses import Response

_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class PageFiles:
    """Those of one folder: read once, by the names that are there and no others."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Response] = {}

    def named(self, name: str) -> Response:
        """The file as a response; 404 if there is none."""
        if not self._files:
            for path in self._folder.iterdir():
                if path.suffix in _TYPES:
                    self._files[path.name] = Response(path.read_bytes(), headers=_HEADERS, media_type=_TYPES[path.suffix])
        return self._files.get(name) or Response(f"there is no {name[:64]} here\n", 404, media_type="text/plain")
