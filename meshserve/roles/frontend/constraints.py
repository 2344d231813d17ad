"""What a text must keep to: a JSON schema, a regular expression or a list of choices, as OpenAI asks for it and as vLLM does. Pure."""

import json
from typing import Any

from meshserve.errors import InvalidRequest
from meshserve.roles.frontend.fields import Fields, boolean, json_text, optional_list, optional_object, optional_string, refuse
from meshserve.roles.frontend.tooling import ANY_OBJECT, MAX_SCHEMA_CHARACTERS, read_response_format
from meshserve.wire.generation import MAX_CHOICE_TEXTS

CONSTRAINTS = frozenset(("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice"))
"""Fields of a request."""
MAX_REGEX_CHARACTERS = 16_384
OPTIONS_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "grammar": (),
    "structural_tag": (),
    "whitespace_pattern": (),
    "disable_fallback": (False,),
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
}
"""Of `structured_outputs`, with the values besides null that ask for nothing."""


def read_constraint(fields: Fields) -> dict[str, Any]:
    """The one of `json_schema`, `regex` and `choices` that is asked for; empty for free text. Raises InvalidRequest for several."""
    asked = [
        ("response_format", "json_schema", read_response_format(fields)),
        ("guided_json", "json_schema", _schema(fields, "guided_json", "guided_json")),
        ("guided_regex", "regex", _regex(fields, "guided_regex", "guided_regex")),
        ("guided_choice", "choices", _choices(fields, "guided_choice", "guided_choice")),
        *_structured(optional_object(fields, "structured_outputs") or {}),
    ]
    found = [(param, attribute, value) for param, attribute, value in asked if value]
    if len(found) > 1:
        raise InvalidRequest(f"only one of {found[0][0]} and {found[1][0]} can be kept to", param=found[1][0])
    return {attribute: value for _, attribute, value in found}


def _structured(options: Fields) -> list[tuple[str, str, Any]]:
    param = "structured_outputs"
    refuse(options, OPTIONS_NOT_DONE)
    return [
        (f"{param}.json", "json_schema", _schema(options, "json", f"{param}.json")),
        (f"{param}.json_object", "json_schema", ANY_OBJECT if boolean(options, "json_object", f"{param}.json_object") else ""),
        (f"{param}.regex", "regex", _regex(options, "regex", f"{param}.regex")),
        (f"{param}.choice", "choices", _choices(options, "choice", f"{param}.choice")),
    ]


def _schema(options: Fields, name: str, param: str) -> str:
    """A schema as an object, or as its text."""
    value = options.get(name)
    if value is None:
        return ""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{param}: the schema is not JSON", param=param) from error
        if not isinstance(value, dict):
            raise InvalidRequest(f"{param}: the schema must be an object", param=param)
    if not isinstance(value, dict):
        raise InvalidRequest(f"{param} must be a JSON Schema, as an object or as text", param=param)
    return json_text(value, param, MAX_SCHEMA_CHARACTERS)


def _regex(options: Fields, name: str, param: str) -> str:
    value = optional_string(options, name, param, MAX_REGEX_CHARACTERS)
    if value == "":
        raise InvalidRequest(f"{param} is empty", param=param)
    return value or ""


def _choices(options: Fields, name: str, param: str) -> tuple[str, ...]:
    value = optional_list(options, name, param, MAX_CHOICE_TEXTS)
    if value is None:
        return ()
    if not value or not all(isinstance(text, str) and text for text in value):
        raise InvalidRequest(f"{param} must be a list of texts, none of them empty", param=param)
    return tuple(value)
