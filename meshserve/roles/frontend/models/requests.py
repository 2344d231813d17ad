"""Sampling, tools and formats: what several APIs have, and what it becomes in a request to a processor. Pure."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

from msgspec import Meta

from meshserve.errors import InvalidRequest
from meshserve.roles.frontend.models import kinds
from meshserve.roles.frontend.models.common import MAX_SESSION_CHARACTERS, Body, Fields, invalid
from meshserve.routing.policies import POLICIES
from meshserve.wire.generation import AskedSampling, Share, TokenCount, TopP
from meshserve.wire.structs import MAX_NESTING, is_shallow

MAX_SCHEMA_CHARACTERS = 262_144
MAX_TOOLS_CHARACTERS = 1_048_576
ANY_OBJECT = '{"type":"object"}'
"""The schema of `json_object`."""
_READ_APART = {"max_tokens", "logit_bias", "logprobs", "regex"}
"""Their names mean something else in one of the APIs, or their values need work."""
_dump = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode

Message = dict[str, Any]
"""Its role (`system`, `user`, `assistant`, `tool`) and content as text; an assistant's may have `tool_calls`, each
with `id`, `name` and `arguments` (JSON text), and `reasoning_content`, which templates may show again; a tool's has
the `tool_call_id` of its call."""

# --- what all APIs that complete share

_UNASKED = "By default the model's own, if it has one."
_TEMPERATURE = "0 takes the likeliest token. Default: the model's."
_MIN_P = f"The least probability, as a share of the likeliest token's, of what is chosen. {_UNASKED}"
_REPETITION_PENALTY = (
    "Divides the logits above 0 of tokens that were there before, and multiplies those below. " + _UNASKED
)
_RECEIPT = "Who served the request, why, and where its time went, with the answer."
_POLICY = Meta(description="How the worker is chosen.", extra_json_schema={"enum": list(POLICIES)})


class Extension(Body):
    """What meshserve takes besides."""

    receipt: Annotated[bool, Meta(description=_RECEIPT)] = False
    policy: Annotated[str, _POLICY] | None = None


class SampledBody(Body, kw_only=True):
    """Sampling, the model, and meshserve's own field.

    A field that :class:`~meshserve.wire.generation.AskedSampling` has too is passed on by its name: see `sampled`.
    """

    model: kinds.ModelName
    min_tokens: Annotated[TokenCount, Meta(description="At most the limit of tokens.")] = 0
    temperature: Annotated[float, Meta(ge=0, le=2, description=_TEMPERATURE)] | None = None
    top_p: Annotated[TopP, Meta(description=_UNASKED)] | None = None
    min_p: Annotated[Share, Meta(description=_MIN_P)] | None = None
    repetition_penalty: (
        Annotated[float, Meta(ge=0.01, le=10, description=_REPETITION_PENALTY)] | None
    ) = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    ignore_eos: Annotated[bool, Meta(description="Go on until the limit of tokens.")] = False
    meshserve: Extension | None = None


class LabelledBody(SampledBody, kw_only=True):
    """With OpenAI's fields for the statistics and caches of the server's owner: they change no answer."""

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


# --- what they become


def sampled(
    asked: SampledBody, fields: Fields, max_tokens: int | None, session: str | None
) -> Fields:
    """Sampling, the model and meshserve's own field. Raises InvalidRequest that names the field."""
    passed_on = _passed_on(type(asked))
    # a body has few of the fields that it might have: only those are looked at
    named = [name for name in fields if name in passed_on]
    found = {name: value for name in named if (value := getattr(asked, name)) is not None}
    found |= {"model": asked.model, "session": (session or "")[:MAX_SESSION_CHARACTERS]}
    if max_tokens is not None and asked.min_tokens > max_tokens:
        raise invalid("min_tokens", f"must be at most max_tokens, which is {max_tokens}")
    if asked.meshserve is not None:
        found |= extension_fields(asked.meshserve)
    return found


def extension_fields(asked: Extension | None) -> Fields:
    """Of meshserve's own field. Raises InvalidRequest for a policy that is unknown."""
    if asked is None:
        return {}
    policy = asked.policy
    if policy is not None and policy not in POLICIES:
        words = f"unknown policy {policy[:64]!r}; there are: {', '.join(POLICIES)}"
        raise InvalidRequest(words, param="meshserve.policy")
    return {"wants_receipt": asked.receipt, "policy": policy}


@cache
def _passed_on(kind: type[SampledBody]) -> frozenset[str]:
    """Sampling fields of this API that a CompletionRequest has by the same name."""
    return frozenset(AskedSampling.__struct_fields__) & set(kind.__struct_fields__) - _READ_APART


def text_of(content: str | list[Any]) -> str:
    """Content as text, or as parts whose texts are joined."""
    return content if isinstance(content, str) else "".join([part.text for part in content])


def paired(messages: Sequence[Message]) -> list[Message]:
    """The messages, with each answer to a call right after the message that has the call.

    An answer without such a message stays where it is: :func:`check_calls` refuses it.
    """
    answers: dict[str, list[Message]] = {}
    called = {call["id"] for message in messages for call in message.get("tool_calls", ())}
    for message in messages:
        if message["role"] == "tool" and message["tool_call_id"] in called:
            answers.setdefault(message["tool_call_id"], []).append(message)
    found: list[Message] = []
    for message in messages:
        if message["role"] != "tool" or message["tool_call_id"] not in called:
            found.append(message)
        ids = {call["id"] for call in message.get("tool_calls", ())}
        # in the order of the answers, which need not be that of the calls
        found += [answer for name, told in answers.items() if name in ids for answer in told]
    return found


def check_calls(messages: Sequence[Message], param: str) -> None:
    """Every call of a tool is answered, by messages that follow it at once. Raises InvalidRequest if not."""
    open_ids: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            answered = message["tool_call_id"]
            if answered not in open_ids:
                words = f"the tool message for {answered[:64]!r} answers no tool call of the assistant's message before it"
                raise InvalidRequest(f"{param}: {words}", param=param)
            open_ids.remove(answered)
            continue
        if open_ids:
            break
        calls = message.get("tool_calls", ())
        open_ids = {call["id"] for call in calls}
        if len(open_ids) != len(calls):
            words = "two tool calls of one message have the same id"
            raise InvalidRequest(f"{param}: {words}", param=param)
    if open_ids:
        words = "is not answered by a tool message right after it"
        raise InvalidRequest(f"{param}: the tool call {min(open_ids)[:64]!r} {words}", param=param)


def tool_fields(
    tools: Sequence[tuple[kinds.Described, Fields | None]],
    param: str,
    choice: object,
    name: str | None,
    is_parallel: bool,
) -> Fields:
    """Tools and the choice among them: no choice is `auto`, and `auto` is `strict` where a tool is strict.

    `param` is the field of a tool that has its parameters; `name` is that of the one tool that is called.
    Raises InvalidRequest for two tools of one name, and for a choice of a tool that is not there.
    """
    names = [function.name for function, _ in tools]
    if len(set(names)) != len(names):
        raise InvalidRequest("two tools have the same name", param="tools")
    if not names:
        if choice == "required" or name is not None:
            raise invalid("tool_choice", "goes with tools only")
        return {}
    if name is not None and name not in names:
        raise invalid("tool_choice", f"names {name[:64]!r}, which is not among the tools")
    if choice in (None, "auto"):
        choice = "strict" if any(function.strict for function, _ in tools) else "auto"
    told = []
    for index, (function, parameters) in enumerate(tools):
        binds = function.strict or choice == "required" or function.name == name
        told.append(_tool(function, parameters, f"tools[{index}].{param}", binds=binds))
    return {
        "tools": json_text(told, "tools", MAX_TOOLS_CHARACTERS),
        "tool_choice": choice if name is None else "function",
        "tool_name": name or "",
        "parallel_tool_calls": is_parallel,
    }


def _tool(
    function: kinds.Described, parameters: Fields | None, param: str, *, binds: bool
) -> Fields:
    """In OpenAI's form. Any schema will do where arguments need not keep to it."""
    schema = parameters or {"type": "object", "properties": {}}
    if binds and schema.get("type", "object") != "object":
        raise invalid(param, "must be a schema of type 'object'")
    json_text(schema, param, MAX_SCHEMA_CHARACTERS)
    told: Fields = {"name": function.name, "description": function.description, "parameters": schema}
    if function.description is None:
        del told["description"]
    if function.strict:
        told["strict"] = True
    return {"type": "function", "function": told}


def format_schema(wanted: object, param: str) -> str:
    """The schema that a format asks the text to be valid under; empty for free text."""
    if isinstance(wanted, kinds.NamedSchema):
        return json_text(wanted.schema, f"{param}.schema", MAX_SCHEMA_CHARACTERS)
    return ANY_OBJECT if isinstance(wanted, kinds.JsonObject) else ""


def json_text(value: Any, param: str, max_characters: int) -> str:
    """What is passed on as JSON. Raises InvalidRequest for what is nested too deeply or too long."""
    if not is_shallow(value):
        raise invalid(param, f"is nested too deeply: at most {MAX_NESTING} levels")
    text = finite_text(value, param)
    if len(text) > max_characters:
        raise invalid(param, f"is too long: at most {max_characters} characters of JSON")
    return text


def finite_text(value: Any, param: str) -> str:
    """The value as JSON. Raises InvalidRequest for a number like 1e999, which JSON can write and floats cannot hold."""
    try:
        return _dump(value)
    except ValueError as error:
        raise invalid(param, "holds a number that is out of range") from error
