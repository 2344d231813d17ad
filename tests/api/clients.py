"""The official clients of one deployment, and what they see of it in a form that two deployments can be compared by."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx
import openai
from anthropic import Anthropic
from openai import AsyncOpenAI, OpenAI

TIMEOUT_S = 20.0
KEYS = ("first-secret", "second-secret")

_CLOSE = {"connection": "close"}
_KEY = {"authorization": f"Bearer {KEYS[0]}"}
_VARYING = frozenset(("id", "created", "created_at", "item_id", "call_id", "tool_call_id", "_request_id", "request_id", "meshserve"))
_HISTORY = frozenset(("cached_tokens", "cache_read_input_tokens"))
"""What depends on what was asked before: how much of a prompt was in the cache."""


@dataclass(frozen=True, slots=True)
class Clients:
    """Of one deployment."""

    url: str
    openai: OpenAI
    anthropic: Anthropic
    http: httpx.Client

    def run(self, ask: Callable[[AsyncOpenAI], Coroutine[Any, Any, Any]]) -> Any:
        """The same with the asynchronous client, on a loop of its own."""

        async def asked() -> Any:
            async with AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEYS[0], timeout=TIMEOUT_S, max_retries=0) as client:
                return await ask(client)

        return asyncio.run(asked())

    def post(self, path: str, body: Any) -> Any:
        """Without a client's help: status, and the body as JSON."""
        content = body if isinstance(body, bytes) else None
        response = self.http.post(path, content=content, json=None if content is not None else body)
        return {"status": response.status_code, "body": plain(response.json())}


@contextmanager
def clients_of(url: str, timeout_s: float = TIMEOUT_S) -> Iterator[Clients]:
    """Clients that give up at once rather than try again, and keep no connection for the next request."""
    with ExitStack() as stack:
        one: Any = openai.DefaultHttpxClient(headers=_CLOSE)
        other: Any = anthropic.DefaultHttpxClient(headers=_CLOSE)
        settings: Any = {"api_key": KEYS[0], "timeout": timeout_s, "max_retries": 0}
        yield Clients(
            url,
            stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", http_client=one, **settings)),
            stack.enter_context(anthropic.Anthropic(base_url=url, http_client=other, **settings)),
            stack.enter_context(httpx.Client(base_url=url, timeout=timeout_s, headers={**_CLOSE, **_KEY})),
        )


def plain(value: Any) -> Any:
    """Plain data without names, times and the cache's history; what is null is left out, as clients differ in how they show it."""
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json", warnings=False)
    if isinstance(value, dict):
        if (cached := value.get("cache_read_input_tokens")) is not None:  # Anthropic counts the rest of the prompt beside it
            value = {**value, "input_tokens": value["input_tokens"] + cached}
        return {key: plain(part) for key, part in value.items() if key not in _VARYING | _HISTORY and part is not None}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def refusal(ask: Callable[[], Any]) -> dict[str, Any]:
    """The error that a client raises: its class, its status, and what the body says. Fails if there is none."""
    try:
        ask()
    except (openai.APIStatusError, anthropic.APIStatusError) as error:
        body = error.body if isinstance(error.body, dict) else {}
        told = body.get("error", body)
        shown = {key: told.get(key) for key in ("type", "param", "code", "message")}
        return {"class": type(error).__name__, "status": error.status_code, **shown}
    raise AssertionError("it was not refused")


@dataclass(slots=True)
class Streamed:
    """A chat or a completion put together from its chunks, each of which was looked at."""

    texts: dict[int, str]
    reasons: dict[int, str]
    calls: dict[int, dict[str, Any]]
    logprobs: dict[int, list[Any]]
    usage: Any

    def outcome(self) -> dict[str, Any]:
        """For a comparison."""
        calls = {index: {key: part for key, part in call.items() if key != "id"} for index, call in self.calls.items()}
        shown: dict[str, Any] = plain(
            {"texts": self.texts, "reasons": self.reasons, "calls": calls, "logprobs": self.logprobs, "usage": self.usage}
        )
        return shown


def gather(chunks: Iterable[Any]) -> Streamed:
    """Check that every choice begins with its role and ends once, and that nothing follows its end."""
    made = Streamed({}, {}, {}, {}, None)
    names = set()
    for chunk in chunks:
        names.add((chunk.id, chunk.model, chunk.created, chunk.system_fingerprint))
        assert made.usage is None, "a chunk after the usage"
        if not chunk.choices:
            made.usage = plain(chunk.usage)
        for choice in chunk.choices:
            assert chunk.usage is None and choice.index not in made.reasons
            _take(made, choice)
            if choice.finish_reason is not None:
                made.reasons[choice.index] = choice.finish_reason
    assert len(names) == 1 and made.reasons.keys() == made.texts.keys()
    return made


def _take(made: Streamed, choice: Any) -> None:
    index = choice.index
    if not hasattr(choice, "delta"):
        made.texts[index] = made.texts.get(index, "") + choice.text
        if choice.logprobs is not None:
            made.logprobs.setdefault(index, []).append(plain(choice.logprobs))
        return
    delta = choice.delta
    if index not in made.texts:
        assert delta.role == "assistant" and not delta.content and not delta.tool_calls, "the first chunk carries the role only"
    else:
        assert delta.role is None
    made.texts[index] = made.texts.get(index, "") + (delta.content or "")
    if choice.logprobs is not None:
        made.logprobs.setdefault(index, []).extend(plain(choice.logprobs.content))
    for piece in delta.tool_calls or ():
        call = made.calls.setdefault(index, {"id": piece.id, "name": piece.function.name, "arguments": ""})
        call["arguments"] += piece.function.arguments
