"""Schemas of ten kinds that a small model can fill within a few hundred tokens, and outputs that must be valid under them."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jsonschema import Draft202012Validator

from tests.api.clients import Clients


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _text(most: int = 24) -> dict[str, Any]:
    return {"type": "string", "maxLength": most}


def _number(least: int, most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most}


def _list(least: int, most: int, items: Any) -> dict[str, Any]:
    return {"type": "array", "minItems": least, "maxItems": most, "items": items}


SCHEMAS: dict[str, Any] = {
    "a person": _object(name=_text(), age=_number(0, 120), is_student={"type": "boolean"}),
    "a colour": _object(name={"enum": ["red", "green", "blue"]}, shade={"enum": [1, 2, None]}),
    "a shopping list": _object(items=_list(1, 4, _object(what=_text(12), count=_number(1, 9)))),
    "a date": _object(day={"type": "string", "pattern": "^[0-9]{4}-[0-1][0-9]-[0-3][0-9]$"}, note=_text()),
    "a point": _object(x=_number(-100, 100), y=_number(-100, 100), label={"const": "point"}),
    "a shape": {"anyOf": [_object(circle=_number(1, 50)), _object(square=_object(side=_number(1, 50), colour=_text(8)))]},
    "a tree": {
        **_object(value=_number(0, 9), children=_list(0, 2, {"$ref": "#/$defs/leaf"})),
        "$defs": {"leaf": _object(value=_number(0, 9))},
    },
    "a score": _object(points=_list(3, 3, _number(0, 10)), winner={"type": ["string", "null"], "maxLength": 10}),
    "a profile": {
        "type": "object",
        "properties": {"born": {"type": "string", "format": "date"}, "tags": _list(0, 3, _text(6))},
        "required": ["born"],
        "additionalProperties": False,
    },
    "a matrix": _object(rows=_list(2, 2, _list(2, 2, _number(-9, 9)))),
}
"""By what is asked for. No string or list may grow without end, so that each output is complete within its tokens."""


def invalid_outputs(clients: Clients, model: str, num_each: int, num_at_once: int) -> list[str]:
    """Ask for so many outputs of each schema, drawn with different seeds; those that are not complete, valid JSON, each with the reason."""
    asked = [(what, seed) for seed in range(num_each) for what in SCHEMAS]

    def judge(what: str, seed: int) -> str:
        choice = _ask(clients, model, what, seed)
        text = choice.message.content or ""
        try:
            Draft202012Validator(SCHEMAS[what], format_checker=Draft202012Validator.FORMAT_CHECKER).validate(json.loads(text))
        except Exception as error:
            return f"{what}, seed {seed}: {text!r} ({choice.finish_reason}): {error}"
        return "" if choice.finish_reason == "stop" else f"{what}, seed {seed}: {text!r} ended by {choice.finish_reason}"

    with ThreadPoolExecutor(num_at_once) as pool:
        return [found for found in pool.map(lambda pair: judge(*pair), asked) if found]


def _ask(clients: Clients, model: str, what: str, seed: int) -> Any:
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMAS[what]}}
    messages: Any = [{"role": "user", "content": f"Describe {what} in JSON."}]
    reply = clients.openai.chat.completions.create(
        model=model, messages=messages, response_format=form, temperature=0.8, seed=seed, max_tokens=400
    )
    return reply.choices[0]
