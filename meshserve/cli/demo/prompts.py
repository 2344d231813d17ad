"""What the demo asks: prompts that take every path through the mesh."""

from dataclasses import dataclass
from typing import Any

_SHOWN_LETTERS = 48
_BRIEFLY = "You answer in one sentence."
"""With their own system messages small models ramble."""
_STORY = """Marta keeps the lighthouse on Gull Island. She lives there with a brown dog named Otto. The island is small, and nobody else \
lives there. Every Tuesday a boat brings bread, milk and letters. The captain of the boat is a quiet man called Henrik. He drinks a cup \
of coffee in her kitchen, tells her the news of the town, and sails home before it gets dark.

In the winter of the great storm the boat did not come for three weeks. The waves were higher than the house, and the wind broke two \
windows of the tower. Marta had no bread left. She ate fish and potatoes, and she burned old chairs to keep warm. But every evening she \
climbed the ninety steps of the tower and lit the lamp. On the last night of the storm she saw a small red light far out on the water. It \
was a fishing boat with five men, and its engine had stopped. Marta rang the bell of the lighthouse all night long, so that the men could \
hear where the rocks were. In the morning the sea was calm, and all five men came safely to the beach. They were cold and hungry, and she \
cooked soup for them.

The men never forgot her. Each year, on the first day of spring, they sail to Gull Island with a basket of apples and a new chair for her \
kitchen."""


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt, and what it shows."""

    title: str
    path: str
    body: dict[str, Any]
    shown: str
    """The prompt as people read it, its middle left out if it is long."""


def dummy_questions(max_tokens: int = 10) -> list[Question]:
    """For an engine whose answers say nothing: short, long, the same again, another long one, a chat."""
    harbours, rivers = _document("harbours"), _document("rivers")
    texts = (
        ("a short prompt stays with its decode worker", "What is a mesh?"),
        ("a long one is prefilled elsewhere, its KV handed over", harbours),
        ("the same again: its blocks are cached", harbours),
        ("another long one", rivers),
    )
    limit = {"max_tokens": max_tokens}
    completions = [Question(title, "/v1/completions", {"prompt": text, **limit}, _cut(text)) for title, text in texts]
    text = "Tell me something about the sea."
    chat = {"messages": [{"role": "user", "content": text}], **limit}
    return [*completions, Question("a chat", "/v1/chat/completions", chat, text)]


def real_questions() -> list[Question]:
    """For a model, however small, that understands what it reads: most likely tokens only, so that every run answers alike."""
    schema = {
        "type": "object",
        "properties": {"colors": {"type": "array", "items": {"type": "string"}, "minItems": 3, "maxItems": 3}},
        "required": ["colors"],
        "additionalProperties": False,
    }
    as_json = {"response_format": {"type": "json_schema", "json_schema": {"name": "colors", "strict": True, "schema": schema}}}
    return [
        _chat("a short prompt stays with its decode worker", "What is the capital of France?"),
        _chat("a long one is prefilled elsewhere, its KV handed over", "What do the men bring each year?", story=_STORY),
        _chat("another question about the same text: its blocks are cached", "What is the name of the island?", story=_STORY),
        _chat("a longer answer", "What is photosynthesis?"),
        _chat("an answer under a JSON Schema", "Name three primary colors, as JSON.", system="You answer in JSON.", more=as_json),
    ]


def _chat(title: str, text: str, *, story: str = "", system: str = _BRIEFLY, more: dict[str, Any] | None = None) -> Question:
    content = f"{story}\n\n{text}" if story else text
    messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
    shown = f"(a story of {len(story.split())} words) {text}" if story else text
    body = {"messages": messages, "max_tokens": 80, "temperature": 0, **(more or {})}
    return Question(title, "/v1/chat/completions", body, shown)


def _document(topic: str) -> str:
    return " ".join(f"Paragraph {number} of a long report on {topic}, with all that was seen and said." for number in range(1, 15))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_LETTERS else f"{text[: _SHOWN_LETTERS - 3]}...  ({len(text)} characters)"
