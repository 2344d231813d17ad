"""What stands before everything else: under which name and from which pages a frontend may be asked, and with which key.

Nothing is open but what is named here, by the path that routing will see: an odd spelling of a path is refused, not let through.
"""

import logging
import time
from collections.abc import MutableMapping
from typing import Any

from meshserve.config import ServeConfig
from meshserve.errors import Forbidden, MeshserveError, Unauthorized
from meshserve.roles.frontend import apis
from meshserve.roles.frontend.access import KeyRing, Sessions
from meshserve.roles.frontend.asgi import ClientGone, Header, Receive, Scope, Send, error_headers, send_whole
from meshserve.roles.frontend.login import LOGIN, LOGOUT, Login, challenge, login_url, session_token, wants_page
from meshserve.roles.frontend.origins import (
    Headers,
    Origins,
    is_cross_site,
    is_loopback,
    is_name_of_loopback,
    is_preflight,
    is_same_origin,
)

CLIENT = "meshserve.client"
"""In the scope of every request that was let in: whose it is, for the fairness between clients."""
EXTRA_HEADERS = "meshserve.extra"
"""In the scope of every request, where pages of others may ask: the headers of every response to it."""

_log = logging.getLogger(__name__)

OPEN_PATHS = ("/health", "/ready")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_NO_KEY = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"


class Guard:
    """Around the whole application. Also the last resort for what nobody caught: one line in the log, and 500."""

    def __init__(self, application: Any, config: ServeConfig) -> None:
        front = config.front
        self._application = application
        self._keys, self._sessions = KeyRing(config.api_keys), Sessions(front.session_s)
        self._login = Login(self._keys, self._sessions, is_tls=front.tls_cert is not None)
        self._origins = Origins(front.cors_origins)
        self._hosts = tuple(name.lower() for name in front.allowed_hosts)
        self._checks_host = is_loopback(config.http_host) and not self._keys
        self._last_host = b""
        """The last one that was let in: most requests name the same."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        headers = dict(reversed(scope["headers"]))  # of a header that comes twice, the first counts
        if self._origins:
            scope[EXTRA_HEADERS] = self.extra_headers(headers)
            send = self._with_cors(send, scope[EXTRA_HEADERS])
        try:
            await self._serve(scope, headers, receive, send)
        except MeshserveError as error:
            body = apis.error_body_for(scope["path"], error)
            await send_whole(send, error.http_status, body, [*error_headers(error), *challenge(error)])
        except ClientGone:
            pass
        except Exception as error:  # a bug: the log says which, and the client only that
            _log.error("%s %s failed: %r", scope["method"], scope["path"], error, exc_info=_log.isEnabledFor(logging.DEBUG))
            await send_whole(send, 500, apis.error_body_for(scope["path"], MeshserveError()), error_headers(MeshserveError()))

    def extra_headers(self, headers: Headers) -> list[Header]:
        """Of every response to a request with these."""
        return self._origins.headers(headers.get(b"origin")) if self._origins else []

    def admit(self, scheme: str, address: str, headers: Headers) -> str:
        """Let a request by POST to an API in, and say whose it is. Raises Unauthorized or Forbidden."""
        if self._checks_host:
            self._check_host(headers)
        if not self._keys:
            self._check_page("POST", headers)
            return address
        client = self._client_of("POST", scheme, headers)
        if client is None:
            raise Unauthorized(_NO_KEY)
        return client

    async def _serve(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        """Let in, or raise Unauthorized or Forbidden."""
        if self._checks_host:
            self._check_host(headers)
        if self._origins and is_preflight(scope["method"], headers):
            await send({"type": "http.response.start", "status": 204, "headers": self._origins.preflight_headers(headers)})
            await send({"type": "http.response.body", "body": b""})
            return
        scope[CLIENT] = scope["client"][0] if scope["client"] else ""
        if not self._keys:
            self._check_page(scope["method"], headers)
        elif scope["path"] in (LOGIN, LOGOUT) and self._may_log_in(scope, headers):
            await self._login.serve(scope, headers, receive, send)
            return
        elif scope["path"] not in OPEN_PATHS and not self._is_known(scope, headers):
            await self._turn_away(scope, headers, send)
            return
        await self._application(scope, receive, send)

    def _may_log_in(self, scope: Scope, headers: Headers) -> bool:
        """The form is for browsers; a program that shows a key is told how it is used."""
        return wants_page(headers) or self._session(headers) is not None or self._is_known(scope, headers)

    def _check_host(self, headers: Headers) -> None:
        host = headers.get(b"host", b"")
        if host == self._last_host and host:
            return
        if not is_name_of_loopback(host, self._hosts):
            name = host.decode("latin-1")
            raise Forbidden(f"{name} is no name of this machine's loopback: start with --allow-host {name} or --api-key if it is meant")
        self._last_host = host

    def _check_page(self, method: str, headers: Headers) -> None:
        """Without keys, what a page of another site sends could be anybody's who runs a website."""
        if method not in _SAFE_METHODS and is_cross_site(headers) and not self._origins.allows(headers.get(b"origin", b"")):
            raise Forbidden("this request was sent by a page of another site; --cors-origin lets one in")

    def _is_known(self, scope: Scope, headers: Headers) -> bool:
        client = self._client_of(scope["method"], scope["scheme"], headers)
        if client is not None:
            scope[CLIENT] = client
        return client is not None

    def _client_of(self, method: str, scheme: str, headers: Headers) -> str | None:
        """By key or session; None without. Raises Forbidden for a cookie that a page of another site makes use of."""
        shown = headers.get(b"x-api-key")
        authorization = headers.get(b"authorization", b"")
        if authorization[:7].lower() == b"bearer ":
            shown = authorization[7:].strip()
        key = self._keys.find(shown) if shown is not None else None
        if shown is not None:
            return f"key {key}" if key is not None else None
        session = self._session(headers)
        if session is None:
            return None
        if method not in _SAFE_METHODS and not is_same_origin(scheme, headers):
            raise Forbidden("a session is for this frontend's own pages; programs send a key")
        return f"key {session}"

    def _session(self, headers: Headers) -> int | None:
        token = session_token(headers)
        return self._sessions.find(token, time.monotonic()) if token else None

    async def _turn_away(self, scope: Scope, headers: Headers, send: Send) -> None:
        if scope["method"] in ("GET", "HEAD") and wants_page(headers):
            query = b"?" + scope["query_string"] if scope["query_string"] else b""
            await send_whole(send, 303, b"", [(b"location", login_url(scope["raw_path"] + query)), (b"cache-control", b"no-store")])
            return
        raise Unauthorized(_NO_KEY)

    @staticmethod
    def _with_cors(send: Send, extra: list[Header]) -> Send:
        async def send_with_cors(event: MutableMapping[str, Any]) -> None:
            if event["type"] == "http.response.start":
                event = {**event, "headers": [*event["headers"], *extra]}
            await send(event)

        return send_with_cors
