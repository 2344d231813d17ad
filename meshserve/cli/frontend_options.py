"""Options of `run` about the HTTP side: keys, TLS, pages, limits."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from meshserve.cli.options import option, pick, together
from meshserve.config import FrontendConfig, ServeConfig
from meshserve.errors import StartupFailed, UsageError
from meshserve.roles.frontend.http.forwarded import TrustedProxies

_FRONTEND, _SERVE = FrontendConfig(), ServeConfig()

_ROOT_PATH = re.compile(r"(/(?!\.\.?(/|$))[A-Za-z0-9._~-]+)+")

frontend_options = together(
    option(
        "--http", default="127.0.0.1:8000", metavar="[HOST:]PORT",
        help="Address of the frontend: PORT listens on loopback, :PORT on all addresses; port 0 takes a free port.",
    ),
    option(
        "--api-key", "api_keys", multiple=True, metavar="KEY",
        help="Asked of HTTP clients, on all routes but /health and /ready; repeatable.",
    ),
    option(
        "--api-key-file", type=click.Path(), metavar="FILE",
        help="More of them, one a line, `#` begins a comment; `ps` shows none of these.",
    ),
    option("--tls-cert", type=click.Path(), metavar="FILE", help="Serve HTTPS with this certificate (PEM, with its chain)."),
    option("--tls-key", type=click.Path(), metavar="FILE", help="The certificate's private key (PEM, not encrypted)."),
    option(
        "--cors-origin", "cors_origins", multiple=True, metavar="ORIGIN",
        help="Origin whose pages may send requests, e.g. https://chat.example.org, http://localhost:* (any port), or * (all); repeatable."
        "  [default: none]",
    ),
    option(
        "--allow-host", "allowed_hosts", multiple=True, metavar="NAME[:PORT]",
        help="Another name for a frontend on loopback without keys, e.g. behind a proxy; repeatable.",
    ),
    option(
        "--root-path", default=_FRONTEND.root_path, metavar="PATH", show_default=False,
        help="Path under which a proxy offers this frontend, e.g. /llm, whether the proxy removes the path or not.  [default: none]",
    ),
    option(
        "--forwarded-allow-ips", default=_FRONTEND.forwarded_allow_ips, metavar="ADDRESS,...", show_default=False,
        help="Proxies whose X-Forwarded-For and X-Forwarded-Proto are trusted: addresses, networks, or *.  [default: none]",
    ),
    option(
        "--request-timeout", "request_timeout_s",
        type=click.FloatRange(0, min_open=True), default=_SERVE.request_timeout_s,
        help="Seconds for a whole request; x-request-timeout may ask for less.",
    ),
    option(
        "--max-queue", "max_queued", type=click.IntRange(0), default=_FRONTEND.max_queued,
        help="Requests that wait here for a place in the mesh.",
    ),
    option(
        "--max-wait", "max_wait_s", type=click.FloatRange(0), default=_FRONTEND.max_wait_s,
        help="Seconds that a request waits for its place before it is refused.",
    ),
    option(
        "--max-decode-queue", type=click.IntRange(1), default=_SERVE.max_decode_queue,
        help="Requests that a decode worker has taken and not begun; beyond it others are asked.",
    ),
    option(
        "--stream-ping", "stream_ping_s", type=click.FloatRange(0), default=_FRONTEND.stream_ping_s,
        help="Longest pause in a stream, in seconds, before a comment is sent; 0: no comments.",
    ),
    option("--max-body-bytes", type=click.IntRange(1024), default=_SERVE.max_body_bytes, help="Longest HTTP body."),
    option("--max-connections", type=click.IntRange(1), default=_FRONTEND.max_connections, help="Open at a time."),
    option(
        "--max-connections-per-address",
        type=click.IntRange(1), default=_FRONTEND.max_connections_per_address,
        help="Of them, of one address.",
    ),
)


def frontend_config(settings: Mapping[str, Any]) -> FrontendConfig:
    """The config by the values of :func:`frontend_options`. Raises UsageError."""
    if (settings["tls_cert"] is None) != (settings["tls_key"] is None):
        raise UsageError("--tls-cert and --tls-key go together")
    for origin in settings["cors_origins"]:
        _check_origin(origin)
    root_path = settings["root_path"].rstrip("/")
    if root_path and not _ROOT_PATH.fullmatch(root_path):
        raise UsageError(f"--root-path {settings['root_path']!r} is not a path like /llm")
    TrustedProxies(settings["forwarded_allow_ips"])  # raises UsageError
    settings = {**settings, "root_path": root_path}
    return pick(FrontendConfig, settings)


def http_address(text: str) -> tuple[str, int]:
    """Host and port of `--http`; an empty host is all addresses. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not port.isdecimal() or not port.isascii() or int(port) > 65_535:
        raise UsageError(f"--http {text!r} is not HOST:PORT, :PORT or PORT")
    return host.removeprefix("[").removesuffix("]") if colon else "127.0.0.1", int(port)


def _check_origin(origin: str) -> None:
    scheme, separator, host = origin.partition("://")
    is_plain = separator and scheme and host and "/" not in host and "*" not in origin.removesuffix(":*") and origin == origin.lower()
    if origin != "*" and not is_plain:
        raise UsageError(f"--cors-origin {origin!r} is not an origin like https://chat.example.org or http://localhost:*, nor *")


def api_keys(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of the command line and of the file. Raises UsageError; StartupFailed for the file.

    An empty key is refused: it would admit everybody by accident.
    """
    keys = [*settings["api_keys"]]
    if not all(key.strip() for key in keys):
        raise UsageError("--api-key is empty: name a key, or leave the option out to serve everybody")
    if settings["api_key_file"] is not None:
        keys += _read_keys(settings["api_key_file"])
    if not all(key.isprintable() for key in keys):
        raise UsageError("an API key holds characters that no header can")
    return tuple(dict.fromkeys(key.strip() for key in keys))


def _read_keys(path: str) -> list[str]:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise StartupFailed(f"--api-key-file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise StartupFailed(f"--api-key-file {path}: not a text file") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise StartupFailed(f"--api-key-file {path}: there is no key in it; write one a line")
    return keys
