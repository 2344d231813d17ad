"""What the known keys of a GGUF file may hold: a file that says something else is damaged, and llama.cpp refuses it too. Pure."""

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MOST_LAYERS, MOST_CONTEXT_TOKENS = 4_096, 1 << 24
_MOST_WIDTH, _MOST_PARTS = 1 << 24, 99_999
_INTEGERS, _FLOATS = "BbHhIiQqLl", "fd"

Check = Callable[[Any], bool]


def _number(least: int, most: int) -> Check:
    return lambda found: isinstance(found, int) and not isinstance(found, bool) and least <= found <= most


def _row(letters: str, least: float, most: float) -> Check:
    def check(found: Any) -> bool:
        return isinstance(found, array) and found.typecode in letters and all(least <= value <= most for value in found)

    return check


def _heads(found: Any) -> bool:
    """One number, or one for each layer."""
    if isinstance(found, array):
        return len(found) <= MOST_LAYERS and _row(_INTEGERS, 0, _MOST_WIDTH)(found)
    return _number(0, _MOST_WIDTH)(found)


def _is_text(found: Any) -> bool:
    return isinstance(found, str)


def _is_truth(found: Any) -> bool:
    return isinstance(found, bool)


def _are_texts(found: Any) -> bool:
    return isinstance(found, Sequence) and not isinstance(found, (str, array))


_CHECKS: Mapping[str, tuple[Check, str]] = {
    "general.architecture": (_is_text, "a text"),
    "split.count": (_number(0, _MOST_PARTS), f"a number from 0 to {_MOST_PARTS:,}"),
    "tokenizer.chat_template": (_is_text, "a text"),
    "tokenizer.ggml.model": (_is_text, "a text"),
    "tokenizer.ggml.pre": (_is_text, "a text"),
    "tokenizer.ggml.tokens": (_are_texts, "a row of texts"),
    "tokenizer.ggml.merges": (_are_texts, "a row of texts"),
    "tokenizer.ggml.token_type": (_row(_INTEGERS, 0, 1 << 16), "a row of small numbers"),
    "tokenizer.ggml.scores": (_row(_FLOATS, float("-inf"), float("inf")), "a row of fractions"),
    "tokenizer.ggml.add_bos_token": (_is_truth, "true or false"),
    "tokenizer.ggml.add_eos_token": (_is_truth, "true or false"),
    "tokenizer.ggml.add_space_prefix": (_is_truth, "true or false"),
}
_OWN_CHECKS: Mapping[str, tuple[Check, str]] = {
    "block_count": (_number(0, MOST_LAYERS), f"a number up to {MOST_LAYERS:,}"),
    "context_length": (_number(1, MOST_CONTEXT_TOKENS), f"a number from 1 to {MOST_CONTEXT_TOKENS:,}"),
    "embedding_length": (_number(0, _MOST_WIDTH), f"a number up to {_MOST_WIDTH:,}"),
    "attention.head_count": (_heads, f"one number up to {_MOST_WIDTH:,}, or a row of them"),
    "attention.head_count_kv": (_heads, f"one number up to {_MOST_WIDTH:,}, or a row of them"),
    "attention.key_length": (_number(0, _MOST_WIDTH), f"a number up to {_MOST_WIDTH:,}"),
    "attention.value_length": (_number(0, _MOST_WIDTH), f"a number up to {_MOST_WIDTH:,}"),
}
"""Of keys that begin with the name of the architecture."""


def fault_of(metadata: Mapping[str, Any]) -> str:
    """What is wrong with the first known value that is of another kind, or beyond reason; "" if none is."""
    own = {f"{metadata.get('general.architecture')}.{key}": check for key, check in _OWN_CHECKS.items()}
    for key, (is_right, wanted) in {**_CHECKS, **own}.items():
        if key in metadata and not is_right(metadata[key]):
            return f"{key!r} is not {wanted}"
    return ""
