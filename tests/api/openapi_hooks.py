"""What schemathesis is told about this server; it loads this by the name in `SCHEMATHESIS_HOOKS`."""

import json
import re
from typing import Any

import schemathesis

from meshserve.wire.generation import MAX_COUNT
from tests.api.openapi_rules import is_rule

MODELS = ["dummy", "nobody"]
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
USER = {"role": "user", "content": "Hello"}
TIMEOUT = "x-request-timeout"
SECONDS = re.compile(r"0\.\d*[1-9]\d*|[1-9]\d{0,2}(\.\d+)?")
UNKNOWN = "x-schemathesis-unknown-property"


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Half of all requests name the model that there is."""
    raw_schema["components"]["schemas"]["Model"] = {"enum": MODELS}


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Requests reach the worker more often: what is allowed stays allowed, and what is not stays as it is."""
    if isinstance(case.body, dict):
        case.body = {**case.body, **shorter(case.body)}
    if SECONDS.fullmatch(str((case.headers or {}).get(TIMEOUT, ""))):
        case.headers[TIMEOUT] = "60"  # a deadline of a millisecond is kept to, with a 504


def shorter(body: dict[str, Any]) -> dict[str, Any]:
    """Fields that are changed: a prompt that is none, answers that do not fit, a conversation without a question."""
    changed: dict[str, Any] = {}
    for name in LENGTHS:
        value = body.get(name)
        if type(value) is int and 64 < value <= MAX_COUNT:
            changed[name] = 1 + value % 64
    messages = body.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        changed["messages"] = [*messages, USER]
    if body.get("prompt") == "":
        changed["prompt"] = "Hello"
    return changed


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """A header that nobody knows is no mistake: the document forbids none."""
    return UNKNOWN not in (case.headers or {})


@schemathesis.check
def refusals_have_a_reason(ctx: Any, response: Any, case: Any) -> None:
    """A request that is valid under the document is refused by a rule that no schema can say, and by no other.

    Stands in for schemathesis's own check, which knows no such rules.
    """
    mode = case.meta.generation.mode if case.meta is not None else None
    if response.status_code != 400 or mode is None or not mode.is_positive:
        return
    told = json.loads(response.content)["error"]
    message = told if isinstance(told, str) else told["message"]
    assert is_rule(message), f"refused though it is valid: {message}"
