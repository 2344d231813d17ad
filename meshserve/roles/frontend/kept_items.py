"""Kept responses, as OpenAI's Responses API shows them: the response, and the items of its input. Pure."""

import json
import re
from typing import Any

from meshserve.roles.frontend.models.common import ResponseOptions
from meshserve.roles.frontend.models.responses import Before
from meshserve.roles.frontend.responses_writers import WholeResponse
from meshserve.roles.frontend.writers import Reply
from meshserve.wire.completion import CompletionRequest
from meshserve.wire.kept import KeptResponse

Json = dict[str, Any]

PREFIX = "resp_"
"""Prefix of a response's id."""
_NAME = re.compile(r"[a-z]{2,4}_([0-9a-f]+?)(?:i[0-9]+|[0-9a-f]{2}(?:n[0-9]+)?)")
"""An item's id: the name of its response, then which item of the input, or of the output it is."""
_TEXT_TYPES = {"user": "input_text", "system": "input_text", "assistant": "output_text"}


def name_of(response_id: str) -> str:
    """The processor's name of the response."""
    return response_id.removeprefix(PREFIX)


def name_in(item_id: str) -> str | None:
    """The name of the response that this item is of; None if no response of this mesh has such items."""
    found = _NAME.fullmatch(item_id)
    return found[1] if found is not None else None


def response_of(kept: KeptResponse) -> Json:
    """The response as its client got it."""
    request = CompletionRequest(kept.name, "chat", kept.model, messages=kept.messages)
    options = ResponseOptions(echoed=json.loads(kept.echoed), created_s=kept.created_s)
    writer = WholeResponse(Reply(PREFIX + _stem(kept), kept.created_s, request, options))
    writer.feed(kept.items)
    writer.end(kept.ending)
    return writer.response(kept.ending)


def before(kept: KeptResponse) -> Before:
    """The conversation that a request continues."""
    return Before(kept.messages, response_of(kept)["output"])


def input_items(kept: KeptResponse) -> list[Json]:
    """The whole conversation before the answer, oldest first."""
    found: list[Json] = []
    for message in kept.messages:
        for prefix, item in _items_of(message):
            found.append({"id": f"{prefix}{_stem(kept)}i{len(found)}", **item, "status": "completed"})
    return found


def items_of(kept: KeptResponse) -> dict[str, Json]:
    """All of its items, of input and output, by id."""
    return {item["id"]: item for item in (*response_of(kept)["output"], *input_items(kept))}


def _stem(kept: KeptResponse) -> str:
    return kept.name.replace("-", "")


def _items_of(message: Json) -> list[tuple[str, Json]]:
    """With the prefix of each one's id."""
    role, text = message["role"], message["content"]
    if role == "tool":
        return [("fco_", {"type": "function_call_output", "call_id": message["tool_call_id"], "output": text})]
    found: list[tuple[str, Json]] = []
    if thought := message.get("reasoning_content"):
        content = [{"type": "reasoning_text", "text": thought}]
        found.append(("rs_", {"type": "reasoning", "summary": [], "content": content}))
    calls = message.get("tool_calls", ())
    if text or not calls:
        part: Json = {"type": _TEXT_TYPES[role], "text": text}
        more: Json = {"annotations": [], "logprobs": []} if role == "assistant" else {}
        found.append(("msg_", {"type": "message", "role": role, "content": [{**part, **more}]}))
    for call in calls:
        named = {"call_id": call["id"], "name": call["name"], "arguments": call["arguments"]}
        found.append(("fc_", {"type": "function_call", **named}))
    return found
