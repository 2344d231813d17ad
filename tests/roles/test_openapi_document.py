"""The OpenAPI document and the parsers, held against each other: the fields that they know, and the bodies that they take."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshserve.errors import InvalidRequest, codes_of
from meshserve.roles import frontend
from meshserve.roles.frontend.models import anthropic, chat, completions, ollama, responses
from meshserve.roles.frontend.models.common import Body
from meshserve.roles.frontend.models.reading import read_object
from meshserve.roles.frontend.models.schemas import name_of
from meshserve.roles.frontend.openapi import document as document_module
from meshserve.roles.frontend.openapi.document import document
from tests.api.openapi_rules import is_rule

DOCUMENT = document(has_keys=True, observes=True)
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]
ROUTES = Path(frontend.__file__).parent

# --- the same fields

STRUCTS: dict[str, list[type[Body]]] = {name_of(body.__name__): [body] for body in document_module.BODIES}
STRUCTS["TokenizeRequest"] = [completions.TokenizePrompt, chat.TokenizeChat]
EXAMPLES: dict[str, dict[str, Any]] = {name: structs[0].EXAMPLE for name, structs in STRUCTS.items()}


def properties_of(schema: dict[str, Any]) -> set[str]:
    return set(schema.get("properties", ())).union(*map(properties_of, schema.get("anyOf", ())))


@pytest.mark.parametrize("name", STRUCTS)
def test_every_field_of_a_struct_is_a_property_and_every_property_a_field(name: str) -> None:
    known = {field for struct in STRUCTS[name] for field in (*struct.__struct_fields__, *struct.OTHERS)}
    assert known == properties_of(SCHEMAS[name])
    assert len(known) > 1


def test_every_route_is_in_the_document_and_nothing_else_is() -> None:
    sources = [path.read_text() for path in ROUTES.rglob("*.py")]
    found = [pair for source in sources for pair in re.findall(r'routes\.add(?:_async)?\("(\w+)", "([^"]+)"', source)]
    found += [("POST", path) for source in sources for path in re.findall(r'\bApi\(\s*"(/[^"]+)"', source)]
    named = {f"{method} {re.sub(r'{.*}', '{}', path)}" for method, path in found}
    files, forms = {"GET /dashboard/{}", "GET /docs/{}"}, {"GET /login", "POST /login", "POST /logout"}
    paths: dict[str, Any] = DOCUMENT["paths"]
    documented = {f"{method.upper()} {re.sub(r'{.*}', '{}', path)}" for path, methods in paths.items() for method in methods}
    assert documented == named - files | forms


# --- the same bodies

FOUND = responses.Before([{"role": "user", "content": "hi"}], [], {"x": {"type": "message", "role": "user", "content": "hi"}})
"""What requests refer to, if their ids are `x`."""
PARSERS: dict[str, Callable[[bytes], Any]] = {
    "CompletionRequest": lambda body: completions.parse_completion(body, "r", "c"),
    "ChatRequest": lambda body: chat.parse_chat(body, "r", "c"),
    "GenerateRequest": lambda body: completions.parse_generate(body, "r", "c", "dummy"),
    "ResponseRequest": lambda body: responses.parse_response(body, "r", "c", FOUND),
    "MessageRequest": lambda body: anthropic.parse_message(body, "r", "c"),
    "CountRequest": lambda body: anthropic.parse_count(body, "r"),
    "OllamaChatRequest": lambda body: ollama.parse_chat(body, "r", "c", str),
    "OllamaGenerateRequest": lambda body: ollama.parse_generate(body, "r", "c", str),
    "OllamaShowRequest": ollama.parse_show,
    "OllamaEmbedRequest": ollama.parse_embed,
}
VALIDATORS = {
    name: jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]})
    for name in PARSERS
}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
SCHEMA = {"name": "n", "schema": {"type": "object"}}
WORDS = ("text", "function", "user", "assistant", "tool", "auto", "required", "none", "any", "json_object", "kv", "medium", "default")
NAMES = (
    "type",
    "role",
    "content",
    "text",
    "name",
    "function",
    "id",
    "tool_calls",
    "refusal",
    "schema",
    "format",
    "receipt",
    "policy",
    "include_usage",
)
LIKELY: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 20, 21, 128, 129, 1.0, 1.5, -2.0, 10_000_000, 10_000_001, 2**32 - 1, 2**32),
    *("", "x", [], {}, [1], [1.0], [1.5], [-1], ["a"], [""], ["a"] * 17, [[1], [2]], [[1], "a"], [[]]),
    *({"5": 1}, {"5": 101}, {"x": 1}, {"5": None}, {"receipt": True}, {"policy": "kv"}, {"policy": "none"}, {"include_usage": True}),
    *([{"role": "user", "content": "hi"}], [{"role": "system", "content": [{"type": "text", "text": "a"}]}], [{"role": "user"}]),
    *([{"role": "assistant"}], [{"role": "assistant", "refusal": "no"}], [{"role": "tool", "content": "a"}], [{"role": "function"}]),
    *(
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "a"},
        ],
    ),
    *([{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "user", "content": "hi", "name": "x" * 257}]),
    *([TOOL], [FUNCTION], [{"type": "function", **FUNCTION}], [{"name": "a b", "input_schema": {}}], [{"name": "f", "input_schema": {}}]),
    *([{"type": "custom", "name": "f", "input_schema": {"type": "string"}}], {"type": "function", "name": "f"}, {"type": "auto"}),
    *({"type": "function", "function": {"name": "f"}}, {"type": "tool", "name": "f"}, {"type": "any"}, {"type": "text"}, {"type": "regex"}),
    *({"type": "json_schema", "json_schema": SCHEMA}, {"type": "json_schema", **SCHEMA}, {"type": "json_schema"}),
    *({"format": {"type": "text"}}, {"format": {}}, {"verbosity": "low"}, {"effort": "none"}, {"effort": "high"}, {"user_id": "me"}),
    *(["message.output_text.logprobs"], ["reasoning.encrypted_content"], ["file_search_call.results"]),
    *({"json": {"type": "object"}}, {"json": "{}"}, {"json": "x"}, {"regex": "a+"}, {"choice": ["a"]}, {"choice": []}, {"grammar": "x"}),
    *({"json": {}, "regex": "a"}, {"json_object": True}, 0.5, "{}", [{"type": "reasoning", "summary": []}]),
    *([{"type": "function_call", "call_id": "c", "name": "f"}, {"type": "function_call_output", "call_id": "c", "output": "a"}],),
    *({"num_predict": 5, "stop": ["a"]}, {"num_predict": -3}, {"mirostat": 0}, {"mirostat": 2}, {"num_ctx": 1}, {"seed": -1.0}),
    *([{"role": "user", "content": "a", "images": []}], [{"role": "user", "images": ["x"]}], [{"role": "tool", "tool_name": "f"}]),
    *([{"role": "developer", "content": [{"type": "input_text", "text": "a"}]}], [{"type": "item_reference", "id": "x"}], *WORDS),
]
OTHER = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("ab 1", max_size=4)
    | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text("ab1", max_size=3), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


def refusal(name: str, body: dict[str, Any]) -> str | None:
    """Why the parser refuses it, if it does."""
    try:
        PARSERS[name](json.dumps(body).encode())
    except InvalidRequest as error:
        return error.message
    return None


@pytest.mark.parametrize("name", PARSERS)
@given(draw=st.data())
@settings(max_examples=150, deadline=None)
def test_what_the_document_allows_is_taken_and_what_it_forbids_is_refused(name: str, draw: st.DataObject) -> None:
    fields = st.sampled_from(sorted(properties_of(SCHEMAS[name])))
    body = {**EXAMPLES[name], **draw.draw(st.dictionaries(fields, st.sampled_from(LIKELY) | OTHER, min_size=1, max_size=2))}
    body.pop(draw.draw(st.sampled_from(["", "", "", *body])), None)
    message = refusal(name, body)
    if VALIDATORS[name].is_valid(body):
        assert message is None or is_rule(message), f"the document allows it: {message}"
    else:
        assert message is not None, "the document forbids it"


@pytest.mark.parametrize("name", PARSERS)
def test_each_field_alone_with_each_likely_value(name: str) -> None:
    for field in properties_of(SCHEMAS[name]):
        for value in LIKELY:
            body = {**EXAMPLES[name], field: value}
            message, is_valid = refusal(name, body), VALIDATORS[name].is_valid(body)
            assert (message is None) is is_valid or (is_valid and is_rule(message or "")), f"{field}={value!r}: {message}"


def test_the_examples_are_valid_and_every_schema_is_a_schema() -> None:
    for name, schema in SCHEMAS.items():
        jsonschema.Draft202012Validator.check_schema(schema)
        if name in EXAMPLES:
            rooted = {**schema, "components": DOCUMENT["components"]}
            jsonschema.Draft202012Validator(rooted).validate(read_object(json.dumps(EXAMPLES[name]).encode()))


# --- the same errors


def test_the_page_on_http_lists_every_error_that_a_client_can_be_told() -> None:
    rows = re.findall(r"^\| (\d{3}) \| (`.*?`) \|", (Path(__file__).parents[2] / "docs" / "http.md").read_text(), re.MULTILINE)
    listed = {(int(status), code) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    responses = DOCUMENT["components"]["responses"]
    statuses = [int(name) for name in responses if name.isdecimal()]
    assert listed == {(status, code) for status in statuses for code in codes_of(status)}
