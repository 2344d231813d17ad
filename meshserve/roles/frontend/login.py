"""The login form for browsers: a key once, then a cookie that is not the key."""

import html
import time
from urllib.parse import parse_qs, quote

from meshserve.errors import Forbidden, RateLimited
from meshserve.roles.frontend.access import SESSION_COOKIE, Guesses, Headers, KeyRing, Sessions, is_cross_site, is_same_origin
from meshserve.roles.frontend.http.messages import Header, Request, Response, body_too_large, header_lines
from meshserve.roles.frontend.routes import Routes

LOGIN, LOGOUT = "/login", "/logout"

_MAX_FORM_BYTES = 8192
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>meshserve: log in</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; display: grid; place-items: center; min-height: 90vh; margin: 0; }}
form {{ width: 20rem; display: grid; gap: .75rem; }}
input, button {{ font: inherit; padding: .5rem; }}
p {{ margin: 0; }}
</style></head>
<body><form method="post" action="{action}">
<h1>meshserve</h1>
<label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<p role="alert">{message}</p>
<button>Log in</button>
</form></body></html>
"""
_NO_STORE: Header = (b"cache-control", b"no-store")
_HTML_HEADERS = header_lines(
    [
        (b"content-type", b"text/html; charset=utf-8"),
        _NO_STORE,
        (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'"),
        (b"referrer-policy", b"same-origin"),
        (b"x-content-type-options", b"nosniff"),
    ]
)


def wants_page(headers: Headers) -> bool:
    """It is a browser that shows what comes, not a program."""
    return b"text/html" in headers.get(b"accept", b"")


def session_token(headers: Headers) -> str:
    """Of the cookie, or nothing."""
    for part in headers.get(b"cookie", b"").decode("latin-1").split(";"):
        name, _, value = part.strip().partition("=")
        if name == SESSION_COOKIE:
            return value
    return ""


def login_url(root_path: str, path: bytes) -> bytes:
    """Where a browser without a session is sent; afterwards it comes back to `path`. Both are below `root_path`."""
    return f"{root_path}{LOGIN}?next={quote(path.decode('latin-1'))}".encode()


class Login:
    """Serves the form, takes the key, ends sessions."""

    def __init__(self, keys: KeyRing, sessions: Sessions, root_path: str) -> None:
        self._keys, self._sessions, self._root_path = keys, sessions, root_path
        self._guesses = Guesses()

    def add_routes(self, routes: Routes) -> None:
        """To the frontend's table."""
        routes.add("GET", LOGIN, lambda request: self._page(200, _target(request), ""))
        routes.add("POST", LOGIN, self._log_in)
        routes.add("POST", LOGOUT, self._log_out)

    def _log_in(self, request: Request) -> Response:
        _check_page(request)
        if len(request.body) > _MAX_FORM_BYTES:
            raise body_too_large(_MAX_FORM_BYTES)
        now_s = time.monotonic()
        wait_s = self._guesses.wait_s(request.address, now_s)
        if wait_s:
            raise RateLimited("too many wrong keys: wait a little", retry_after_s=wait_s)
        form = parse_qs(request.body.decode("utf-8", "replace"))
        key = self._keys.find(form.get("key", [""])[0].strip().encode())
        if key is None:
            self._guesses.was_wrong(request.address, now_s)
            return self._page(401, _target(request), "This is not a key of this frontend.")
        self._guesses.was_right(request.address)
        return self._redirect(request, _target(request), f"{SESSION_COOKIE}={self._sessions.begin(key, now_s)}")

    def _log_out(self, request: Request) -> Response:
        _check_page(request)
        self._sessions.end(session_token(request.headers), time.monotonic())
        return self._redirect(request, LOGIN, f"{SESSION_COOKIE}=; Max-Age=0")

    def _redirect(self, request: Request, target: str, cookie: str) -> Response:
        """By the scheme of the request, not of the socket: a proxy may end TLS."""
        is_secure = "; Secure" if request.scheme == "https" else ""
        cookie_header = (b"set-cookie", f"{cookie}; Path={self._root_path or '/'}; HttpOnly; SameSite=Strict{is_secure}".encode())
        location = (b"location", f"{self._root_path}{target}".encode())
        return Response(303, b"", header_lines([location, cookie_header, _NO_STORE]))

    def _page(self, status: int, target: str, message: str) -> Response:
        action = f"{self._root_path}{LOGIN}?next={quote(target)}"
        body = _PAGE.format(action=html.escape(action), message=html.escape(message)).encode()
        return Response(status, body, _HTML_HEADERS)


def _target(request: Request) -> str:
    """Where to go after the login: a path of this server and nothing else."""
    target = parse_qs(request.query.decode("latin-1")).get("next", ["/"])[0]
    is_own = target.startswith("/") and not target.startswith(("//", "/\\")) and target.isprintable() and target.isascii()
    return target if is_own else "/"


def _check_page(request: Request) -> None:
    """A form of another site must not log a browser in or out."""
    headers = request.headers
    if is_cross_site(headers) or (b"origin" in headers and not is_same_origin(request.scheme, headers)):
        raise Forbidden("this form was sent by a page of another site")
