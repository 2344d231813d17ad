"""An HTTP request as attributes of a server's span, by OpenTelemetry's semantic conventions.

(HTTP spans, server; the version is `SCHEMA_URL` of `observe/otlp.py`.)
"""

from typing import Any

from meshserve.roles.frontend.http.messages import Request
from meshserve.roles.frontend.http.request_log import CLIENT_LEFT

_MAX_CHARACTERS = 256
_MAX_PORT = 65535


def span_attributes(request: Request) -> dict[str, Any]:
    """What is known once the request is over. The query is left out: it may hold secrets."""
    host, port = _host_and_port(_header(request, b"host"))
    found = {
        "http.request.method": request.method,
        "http.route": request.route,
        "url.path": request.path[:_MAX_CHARACTERS],
        "url.scheme": request.scheme,
        "http.response.status_code": request.status if request.status != CLIENT_LEFT else 0,
        "network.protocol.version": "1.1" if request.takes_chunks else "1.0",
        "client.address": request.address,
        "server.address": host,
        "server.port": port,
        "user_agent.original": _header(request, b"user-agent"),
    }
    return {name: value for name, value in found.items() if value}


def _header(request: Request, name: bytes) -> str:
    return request.headers.get(name, b"").decode("latin-1")[:_MAX_CHARACTERS]


def _host_and_port(host: str) -> tuple[str, int]:
    """0 for a port that is not named. What is no port is left out: a collector refuses all spans of a
    message for one number that is too large.
    """
    name, colon, port = host.rpartition(":")
    if colon and port.isdecimal():
        return name.strip("[]"), int(port) if int(port) <= _MAX_PORT else 0
    return host.strip("[]"), 0
