"""A headless Chromium, driven over its DevTools protocol (https://chromedevtools.github.io/devtools-protocol/)."""

import base64
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from tests.harness.processes import Process
from tests.harness.waiting import wait_until

CHROMIUM = shutil.which("chromium")
START_S = 20.0
ANSWER_S = 20.0

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-breakpad",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
)


class Page:
    """One page. It keeps what its console complained of, and every address that it asked for."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        self.errors: list[str] = []
        self.addresses: list[str] = []
        self._trace: list[dict[str, Any]] = []
        self._is_trace_complete = False
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer. Raises AssertionError for an error, TimeoutError if there is no answer."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._connection.recv(ANSWER_S))
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.addresses.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(
                str(params["exceptionDetails"].get("exception", {}).get("description") or params["exceptionDetails"]["text"])
            )
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(value.get("value", value.get("description"))) for value in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Tracing.dataCollected":
            self._trace += params["value"]
        elif method == "Tracing.tracingComplete":
            self._is_trace_complete = True

    def open(self, url: str) -> None:
        """Go there; returns as soon as it is on its way."""
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise. Raises AssertionError if it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def wait_for(self, expression: str, deadline_s: float) -> Any:
        """Until the expression's value is true; returns that value."""
        return wait_until(lambda: self.evaluate(expression), deadline_s, f"in the page: {expression}")

    def press(self, key: str, modifiers: int = 0) -> None:
        """One key, as DevTools names it: `Tab`, `Escape`, `ArrowDown`, `Enter`."""
        text = {"text": "\r"} if key == "Enter" else {}
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        common = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def resize(self, width: int, height: int, *, is_phone: bool = False) -> None:
        """The window's size in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if is_phone else 1, mobile=is_phone)

    def prefer(self, **features: str) -> None:
        """What the user prefers, e.g. `color_scheme="dark"`, `reduced_motion="reduce"`."""
        named = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=named)

    def begin_trace(self) -> None:
        """Keep account of what the page's main thread does from now on."""
        self._trace, self._is_trace_complete = [], False
        self.call("Tracing.start", traceConfig={"includedCategories": ["toplevel", "devtools.timeline"]})

    def end_trace(self) -> list[float]:
        """The tasks of the page's main thread since then: CPU time of each, in milliseconds."""
        self.call("Tracing.end")
        while not self._is_trace_complete:
            self._note(json.loads(self._connection.recv(ANSWER_S)))
        mains = {(event["pid"], event["tid"]) for event in self._trace if event.get("args", {}).get("name") == "CrRendererMain"}
        is_task = [event for event in self._trace if event["name"].endswith("RunTask") and event["ph"] == "X"]
        return [event.get("tdur", 0) / 1000 for event in is_task if (event["pid"], event["tid"]) in mains]

    def screenshot(self, path: Path, *, is_whole: bool = False) -> None:
        """What is seen, as PNG; whole: beyond the window's lower edge."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=is_whole)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def open_browser(netns: str | None = None) -> Iterator[Page]:
    """A browser with one empty page, on the loopback of `netns` if one is named; both end with the block."""
    assert CHROMIUM is not None, "no chromium"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        with Process(command, netns=netns, env={"HOME": profile}) as browser:
            endpoint = browser.wait_for_line(r"DevTools listening on ws://([^/]+)/", START_S)[1]
            pages = httpx.get(f"http://{endpoint}/json/list", timeout=ANSWER_S, trust_env=False).json()
            url = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
            with connect(url, max_size=None, compression=None, proxy=None) as connection:
                yield Page(connection)


def page_or_skip() -> Iterator[Page]:
    """The page of a browser, for a fixture; a machine without a browser skips the tests."""
    if CHROMIUM is None:
        pytest.skip("no chromium: Debian's package of that name")
    with open_browser() as page:
        yield page
