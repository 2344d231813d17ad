"""The login form for browsers: a key once, then a cookie that is not the key."""

import html
import time
from urllib.parse import parse_qs, quote

from meshserve.errors import Forbidden, InvalidRequest, MeshserveError, RateLimited
from meshserve.roles.frontend.access import SESSION_COOKIE, Guesses, KeyRing, Sessions
from meshserve.roles.frontend.asgi import JSON, Header, Receive, Scope, Send, read_body, send_whole
from meshserve.roles.frontend.origins import Headers, is_cross_site, is_same_origin
from meshserve.roles.frontend.shapes import error_body

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
_HTML_HEADERS: list[Header] = [
    (b"content-type", b"text/html; charset=utf-8"),
    _NO_STORE,
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'"),
    (b"referrer-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
]


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


def login_url(path: bytes) -> bytes:
    """Where a browser without a session is sent; afterwards it comes back to `path`."""
    return f"{LOGIN}?next={quote(path.decode('latin-1'))}".encode()


class Login:
    """Serves the form, takes the key, ends sessions."""

    def __init__(self, keys: KeyRing, sessions: Sessions, is_tls: bool) -> None:
        self._keys, self._sessions = keys, sessions
        self._guesses = Guesses()
        self._cookie_end = f"; Path=/; HttpOnly; SameSite=Strict{'; Secure' if is_tls else ''}"

    async def serve(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        """`/login` and `/logout`. Raises MeshserveError for what is no form's request."""
        target, method = _target(scope), scope["method"]
        if method == "POST" and scope["path"] == LOGOUT:
            await self._log_out(scope, headers, send)
        elif method == "POST":
            await self._log_in(scope, headers, receive, send, target)
        elif method in ("GET", "HEAD") and scope["path"] == LOGIN:
            await self._page(send, 200, target, "")
        else:
            await _refuse_method(scope, send)

    async def _log_in(self, scope: Scope, headers: Headers, receive: Receive, send: Send, target: str) -> None:
        _check_page(scope, headers)
        now_s = time.monotonic()
        address = scope["client"][0] if scope["client"] else ""
        wait_s = self._guesses.wait_s(address, now_s)
        if wait_s:
            raise RateLimited("too many wrong keys: wait a little", retry_after_s=wait_s)
        form = parse_qs((await read_body(receive, _MAX_FORM_BYTES)).decode("utf-8", "replace"))
        key = self._keys.find(form.get("key", [""])[0].strip().encode())
        if key is None:
            self._guesses.was_wrong(address, now_s)
            await self._page(send, 401, target, "This is not a key of this frontend.")
            return
        self._guesses.was_right(address)
        cookie = f"{SESSION_COOKIE}={self._sessions.begin(key, now_s)}{self._cookie_end}"
        await send_whole(
            send, 303, b"", [(b"location", target.encode()), (b"set-cookie", cookie.encode()), (b"cache-control", b"no-store")]
        )

    async def _log_out(self, scope: Scope, headers: Headers, send: Send) -> None:
        _check_page(scope, headers)
        self._sessions.end(session_token(headers), time.monotonic())
        cookie = f"{SESSION_COOKIE}=; Max-Age=0{self._cookie_end}".encode()
        await send_whole(send, 303, b"", [(b"location", LOGIN.encode()), (b"set-cookie", cookie), _NO_STORE])

    async def _page(self, send: Send, status: int, target: str, message: str) -> None:
        action = f"{LOGIN}?next={quote(target)}"
        body = _PAGE.format(action=html.escape(action), message=html.escape(message)).encode()
        await send_whole(send, status, body, _HTML_HEADERS)


async def _refuse_method(scope: Scope, send: Send) -> None:
    allowed = b"POST" if scope["path"] == LOGOUT else b"GET, HEAD, POST"
    body = error_body(InvalidRequest(f"{scope['method']} is not for {scope['path']}"))
    await send_whole(send, 405, body, [JSON, (b"allow", allowed)])


def _target(scope: Scope) -> str:
    """Where to go after the login: a path of this server and nothing else."""
    target = parse_qs(scope["query_string"].decode("latin-1")).get("next", ["/"])[0]
    is_own = target.startswith("/") and not target.startswith(("//", "/\\")) and target.isprintable() and target.isascii()
    return target if is_own else "/"


def _check_page(scope: Scope, headers: Headers) -> None:
    """A form of another site must not log a browser in or out."""
    if is_cross_site(headers) or (b"origin" in headers and not is_same_origin(scope["scheme"], headers)):
        raise Forbidden("this form was sent by a page of another site")


def challenge(error: MeshserveError) -> list[Header]:
    """How a refused client is told what to show."""
    return [(b"www-authenticate", b"Bearer")] if error.http_status == 401 else []
