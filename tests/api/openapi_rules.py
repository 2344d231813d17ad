"""What is refused though the OpenAPI document allows it: rules between fields that a JSON Schema cannot say."""

import re

RULES = (
    r"the prompt is empty",
    r"input has no message",
    r"min_tokens must be (at most|between)",
    r"context is \d+ tokens",
    r"above this model's last",
    r"this model's last token is",
    r"tool_choice names '.*', which is not among the tools",
    r"two tools have the same name",
    r"two tool calls of one message have the same id",
    r"the tool call .* is not answered",
    r"the tool message for .* answers no tool call",
    r"must be a schema of type 'object'",  # only where it binds
    r"tool_choice goes with tools only",  # all tools may have been left out
    r"the last one must be the user's",
    r"best_of must be",
    r"only one of .* can be kept to",
    r"(Previous response|Item|Response) with id .* not found",
    r"after: there is no item",
    r"a response that is kept is given as a whole",
    r"n times the number of prompts",
    r"no engine here makes embeddings",
    r"the (schema|string format)|schema's|cannot be (kept to|merged)",
)
_RULE = re.compile("|".join(RULES), re.DOTALL)


def is_rule(message: str) -> bool:
    """Whether one of these rules says so."""
    return _RULE.search(message) is not None
