"""Chat templates: a model's own Jinja, rendered in Jinja's sandbox."""

from functools import lru_cache
from typing import Any

from meshserve.errors import InvalidRequest

MAX_PROMPT_CHARACTERS = 16_000_000


@lru_cache(maxsize=32)
def _compiled(template: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # a slow import that completions need not wait for

    def raise_exception(message: str) -> None:
        raise InvalidRequest(message, param="messages")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


def render_chat(
    template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, add_generation_prompt: bool = True
) -> str:
    """The prompt that a chat stands for, the assistant's turn begun. Raises InvalidRequest where the template refuses these messages."""
    from jinja2 import TemplateError

    try:
        prompt: str = _compiled(template).render(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise InvalidRequest(f"the model's chat template does not take these messages: {error}", param="messages") from error
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequest("the messages are too long", param="messages")
    return prompt
