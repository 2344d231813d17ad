"""The guard: under which name and from which pages a frontend may be asked, and with which key.

Nothing is open but what is named here, by the path that routing will see: an odd spelling of a path is refused, not let through.
"""

import time

from meshserve.config import ServeConfig
from meshserve.errors import Forbidden, Unauthorized
from meshserve.roles.frontend import access
from meshserve.roles.frontend.http.messages import Request, Response, header_lines
from meshserve.roles.frontend.login import LOGIN, LOGOUT, Login, login_url, session_token, wants_page

OPEN_PATHS = ("/health", "/ready")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class Guard:
    """Stands before all routes: every request passes `admit`, once its head is read."""

    def __init__(self, config: ServeConfig, secret: bytes) -> None:
        """`secret` makes owners of API keys."""
        limits = config.frontend
        self._keys, self._sessions = access.KeyRing(config.api_keys), access.Sessions(limits.session_s)
        self._has_keys = bool(config.api_keys)
        self._owners = [access.owner_of(secret, key) for key in dict.fromkeys(config.api_keys)]
        self._root_path = limits.root_path
        self.login = Login(self._keys, self._sessions, limits.root_path) if self._has_keys else None
        """Its routes, where there are keys."""
        self._origins = access.Origins(limits.cors_origins)
        self._has_origins = bool(limits.cors_origins)
        self._hosts = tuple(name.lower() for name in limits.allowed_hosts)
        self._checks_host = access.is_loopback(config.http_host) and not self._has_keys
        self._last_host: bytes | None = None
        """The last one that was let in: most requests name the same."""

    def admit(self, request: Request) -> Response | None:
        """Let a request in, and note its client and what every response to it says to its page; or answer it.

        Raises Unauthorized or Forbidden.
        """
        headers = request.headers
        if self._has_origins:
            request.extra_headers = header_lines(self._origins.headers(headers.get(b"origin")))
        host = headers.get(b"host", b"")
        if self._checks_host and host != self._last_host:
            self._check_host(host)
        if self._has_origins and access.is_preflight(request.method, headers):  # before keys: browsers send none with this question
            return Response(204, b"", header_lines(self._origins.preflight_headers(headers)))
        request.client = request.address
        if self._has_keys:
            return self._check_key(request)
        if b"sec-fetch-site" in headers and request.method not in _SAFE_METHODS:
            self._check_page(request)
        return None

    def _check_host(self, host: bytes) -> None:
        """An open frontend on loopback answers to names of loopback alone (DNS rebinding)."""
        if not access.is_name_of_loopback(host, self._hosts):
            name, shown = access.name_of(host), host.decode("latin-1")
            raise Forbidden(f"{shown} is no name of this machine's loopback: start with --allow-host {name} or --api-key if it is meant")
        self._last_host = host

    def _check_page(self, request: Request) -> None:
        """Without keys, what a page of another site sends could be anybody's who runs a website."""
        if access.is_cross_site(request.headers) and not self._origins.allows(request.headers.get(b"origin", b"")):
            raise Forbidden("this request was sent by a page of another site; --cors-origin lets one in")

    def _check_key(self, request: Request) -> Response | None:
        if request.path in OPEN_PATHS:
            return None
        is_for_page = wants_page(request.headers)
        # The form is for browsers; a program that shows no key is told how a key is sent.
        if request.path in (LOGIN, LOGOUT) and (is_for_page or self._session(request) is not None):
            return None
        key = self._key_of(request)
        if key is not None:
            request.client, request.owner = f"key {key}", self._owners[key]
            return None
        if is_for_page and request.method in ("GET", "HEAD"):
            query = b"?" + request.query if request.query else b""
            location = login_url(self._root_path, request.raw_path + query)
            return Response(303, b"", header_lines([(b"location", location), (b"cache-control", b"no-store")]))
        raise Unauthorized("the API key is missing or wrong: send it as `Authorization: Bearer KEY`")

    def _key_of(self, request: Request) -> int | None:
        """By key or session; None without. Raises Forbidden for a cookie that a page of another site makes use of."""
        headers = request.headers
        authorization = headers.get(b"authorization", b"")
        if authorization[:7].lower() == b"bearer ":
            shown: bytes | None = authorization[7:].strip()
        else:
            shown = headers.get(b"x-api-key", headers.get(b"api-key"))
        if shown is not None:
            return self._keys.find(shown)
        session = self._session(request)
        if session is None:
            return None
        if request.method not in _SAFE_METHODS and not access.is_same_origin(request.scheme, headers):
            raise Forbidden("a session is for this frontend's own pages; programs send a key")
        return session

    def _session(self, request: Request) -> int | None:
        token = session_token(request.headers)
        return self._sessions.find(token, time.monotonic()) if token else None
