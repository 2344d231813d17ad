"""`python -m docs.fields`: writes docs/fields.md from the table of fields and the structs of the HTTP APIs."""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

from meshserve.roles.frontend.models import anthropic, chat, completions, ollama, responses
from meshserve.roles.frontend.models.common import Body
from meshserve.roles.frontend.models.fields import HEADER, LEFT_OUT_BLOCKS, LEFT_OUT_ITEMS, Handling

PAGE = Path(__file__).with_name("fields.md")
BODIES: dict[str, tuple[type[Body], ...]] = {
    "/v1/chat/completions": (chat.ChatBody,),
    "/v1/completions": (completions.CompletionBody,),
    "/v1/responses": (responses.ResponseBody,),
    "/v1/messages": (anthropic.MessageBody,),
    "/v1/messages/count_tokens": (anthropic.CountBody,),
    "/generate": (completions.GenerateBody,),
    "/api/chat": (ollama.OllamaChatBody,),
    "/api/generate": (ollama.OllamaGenerateBody,),
    "/tokenize": (completions.TokenizePrompt, chat.TokenizeChat),
}
PARTS: dict[str, dict[str, type[Body]]] = {
    "/v1/responses": {"text.": responses.TextOptions},
    "/v1/messages": {"output_config.": anthropic.OutputConfig},
    "/v1/messages/count_tokens": {"output_config.": anthropic.OutputConfig},
    "/v1/chat/completions": {"structured_outputs.": completions.StructuredOutputs},
    "/v1/completions": {"structured_outputs.": completions.StructuredOutputs},
    "/api/chat": {"options.": ollama.OllamaOptions},
    "/api/generate": {"options.": ollama.OllamaOptions},
}
"""Objects within a body that have rows of their own."""
ABOUT = f"""# Fields of the HTTP APIs

`python -m docs.fields` writes this page from the table that the parsers read (`roles/frontend/models/fields.py`) and
from the structs beside it.

- **Done**: the engine does it.
- **Ignored**: it asks only for effort, speed, bookkeeping or presentation, or declares what a server would do by
  itself. The answer is valid without it, and the response header `{HEADER}` lists it.
- **Refused**: it would change the answer. The error is a 400 that names the field; null, and the values that ask for
  nothing, are taken.

A field that no row names is ignored and listed. Tools that are no functions are left out of the model's tools and
listed by their type, as `tools.web_search`; a choice that forces one of them is refused.
"""
_WIDTH = 116


def page() -> str:
    """The whole page."""
    return "\n".join([ABOUT, *map(_section, BODIES), *_history()])


def _section(path: str) -> str:
    rows = dict(row for body in BODIES[path] for row in _rows(body, ""))
    for prefix, part in PARTS.get(path, {}).items():
        rows |= dict(_rows(part, prefix))
    done = sorted(name for name, how in rows.items() if how is None)
    others = sorted((how.line, name, how) for name, how in rows.items() if how is not None)
    table = [f"| `{name}` | {line} | {_words(how)} |" for line, name, how in others]
    names = textwrap.fill(f"Done: {', '.join(f'`{name}`' for name in done)}.", _WIDTH, break_on_hyphens=False)
    return "\n".join([f"## {path}\n", f"{names}\n", "| field | | |", "|---|---|---|", *table, ""])


def _rows(body: type[Body], prefix: str) -> Iterator[tuple[str, Handling | None]]:
    for name in (*body.__struct_fields__, *body.OTHERS):
        yield prefix + name, body.OTHERS.get(name)


def _words(how: Handling) -> str:
    taken = ", ".join(f"`{json.dumps(value)}`" for value in how.unasked)
    return how.why + (f" Taken: {taken}." if taken and how.line == "refused" else "")


def _history() -> Iterator[str]:
    yield "## What is left out of a conversation\n"
    yield "What only a server's own tools did, in a conversation that another model began, is left out and listed.\n"
    for path, names in (("/v1/responses", LEFT_OUT_ITEMS), ("/v1/messages", LEFT_OUT_BLOCKS)):
        listed = ", ".join(f"`{name}`" for name in names.split())
        yield textwrap.fill(f"`{path}`: {listed}.", _WIDTH) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
