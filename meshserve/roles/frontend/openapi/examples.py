"""A body for each route that takes one, as people would send it. Pure."""

from typing import Any

_MODEL = {"model": "dummy"}
_MESSAGES = {"messages": [{"role": "user", "content": "Hello"}]}

EXAMPLES: dict[str, dict[str, Any]] = {
    "ChatRequest": {**_MODEL, **_MESSAGES, "max_tokens": 16},
    "CompletionRequest": {**_MODEL, "prompt": "Hello", "max_tokens": 16},
    "ResponseRequest": {**_MODEL, "input": "Hello", "max_output_tokens": 16},
    "MessageRequest": {**_MODEL, **_MESSAGES, "max_tokens": 16},
    "CountRequest": {**_MODEL, **_MESSAGES},
    "GenerateRequest": {"prompt": "Hello", "max_tokens": 16},
    "TokenizeRequest": {"prompt": "Hello"},
    "DetokenizeRequest": {"tokens": [72, 101, 108, 108, 111]},
}
"""By the name of its schema."""
