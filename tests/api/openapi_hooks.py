"""What schemathesis is told about this server: names of models, and the rules that a JSON Schema cannot say."""

import json
import re
from typing import Any

import schemathesis

from meshserve.wire.completion import MAX_COUNT

UNKNOWN = "x-schemathesis-unknown-property"
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
MODELS = ["dummy", "nobody"]
RULES = (
    r"the prompt is empty",
    r"min_tokens must be at most max_tokens",
    r"context is \d+ tokens",
    r"above this model's last",
    r"this model's last token is",
    r"tool_choice names '.*', which is not among the tools",
    r"two tools have the same name",
    r"two tool calls of one message have the same id",
    r"the tool (call|message) .* (is not answered|answers no tool call)",
    r"tool_result blocks come before all others",
    r"the last one must be the user's",
    r"best_of must be",
    r"n times the number of prompts",
    r"parts? of the schema|schema",
)
_RULE = re.compile("|".join(RULES), re.DOTALL)


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Half of all requests name the model that there is."""
    raw_schema["components"]["schemas"]["Model"] = {"enum": MODELS}


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Answers that fit into the context: what is allowed stays allowed, and what is not is left as it is."""
    if not isinstance(body, dict):
        return body
    short = {name: 1 + value % 64 for name, value in body.items() if name in LENGTHS and type(value) is int and 64 < value <= MAX_COUNT}
    return {**body, **short}


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """A header that nobody knows is no mistake: the document forbids none."""
    return UNKNOWN not in (case.headers or {})


@schemathesis.check
def refusals_have_a_reason(ctx: Any, response: Any, case: Any) -> None:
    """A request that is valid under the document is refused by a rule that no schema can say, and by no other."""
    mode = case.meta.generation.mode if case.meta is not None else None
    if response.status_code != 400 or mode is None or not mode.is_positive:
        return
    message = json.loads(response.content)["error"]["message"]
    assert _RULE.search(message), f"refused though it is valid: {message}"
