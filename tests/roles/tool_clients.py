"""OpenAI's and Anthropic's clients in front of a worker that is played by hand, with two tools to call."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from tests.harness import run_async
from tests.roles.scripted import Scene, served

FEATURES = ("logprobs", "json_schema", "tool_text")
USER: Any = [{"role": "user", "content": "How is it in Rome?"}]
PARAMETERS: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
CLOCK: Any = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
BOTH: Any = [WEATHER, CLOCK]


class Clients(NamedTuple):
    scene: Scene
    openai: AsyncOpenAI
    anthropic: AsyncAnthropic

    def says(self, *steps: str) -> None:
        """What the model writes from now on."""
        self.scene.worker.script = steps

    @property
    def prompt(self) -> str:
        """Of the last request."""
        return bytes(self.scene.worker.calls[-1].body.tokens.tolist()).decode()

    @property
    def schema(self) -> str:
        """What the last output was made to keep to."""
        schema: str = self.scene.worker.calls[-1].body.sampling.json_schema
        return schema

    async def chat(self, **fields: Any) -> Any:
        return await self.openai.chat.completions.create(**{"model": "dummy", "messages": USER, "tools": BOTH, **fields})

    async def message(self, **fields: Any) -> Any:
        tools = [{"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in BOTH]
        asked = {"model": "dummy", "messages": USER, "tools": tools, "max_tokens": 500, **fields}
        return await self.anthropic.messages.create(**asked)

    async def response(self, **fields: Any) -> Any:
        tools = [{"type": "function", **tool["function"]} for tool in BOTH]
        return await self.openai.responses.create(**{"model": "dummy", "input": USER, "tools": tools, **fields})


@asynccontextmanager
async def clients(*steps: str, **card: Any) -> AsyncIterator[Clients]:
    settings: Any = {"api_key": "none", "max_retries": 0, "timeout": 20.0, "default_headers": {"connection": "close"}}
    async with served(**{"features": FEATURES, **card}) as (found, url):
        found.worker.script = steps
        async with AsyncOpenAI(base_url=f"{url}/v1", **settings) as one, AsyncAnthropic(base_url=url, **settings) as other:
            yield Clients(found, one, other)


def run(check: Callable[[Clients], Awaitable[None]], *steps: str, **card: Any) -> None:
    async def checked() -> None:
        async with clients(*steps, **card) as made:
            await check(made)

    run_async(checked())


def calls_of(message: Any) -> list[tuple[str, Any]]:
    """Of a chat's message."""
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


async def gathered(stream: Any) -> dict[str, Any]:
    """A streamed chat put together."""
    made: dict[str, Any] = {"reasoning": "", "content": "", "calls": {}, "ids": set(), "reason": None}
    async for chunk in stream:
        for choice in chunk.choices:
            delta = choice.delta
            made["reasoning"] += getattr(delta, "reasoning_content", None) or ""
            made["content"] += delta.content or ""
            made["reason"] = choice.finish_reason or made["reason"]
            for piece in delta.tool_calls or ():
                name, arguments = made["calls"].get(piece.index, ("", ""))
                made["calls"][piece.index] = (name + (piece.function.name or ""), arguments + piece.function.arguments)
                made["ids"] |= {piece.id} - {None}
    return made
