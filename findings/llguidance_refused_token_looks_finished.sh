#!/usr/bin/env bash
# llguidance 1.9.1: after a refused token the matcher looks like one that is finished.
#
# One would guess: `consume_token` returns False for a token that the grammar does not allow, and leaves the matcher as it was. Or it
# raises. In any case a matcher that met an error and a matcher at the end of its text can be told apart by `is_stopped()`.
#
# What happens: the first refused token ends the matcher. `is_stopped()` is True, and the mask allows the end of sequence and nothing
# else, exactly as after a complete text; a text of no characters or half an object ends as if it were whole. Only `is_error()` and
# `is_accepting()` tell. `try_consume_tokens` with the same token takes 0 tokens and leaves the matcher usable.
#
# Why it matters: a generation loop that samples under the mask until `is_stopped()` reports a regular end ("stop") with broken JSON.
# Where a token may be refused (speculative decoding, tokens of another peer), use `try_consume_tokens`, and ask `is_error()` at each end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet llguidance==1.9.1

"$folder/venv/bin/python" - <<'END'
import json
from importlib.metadata import version

from llguidance import LLMatcher, LLTokenizer

END_OF_SEQUENCE = 256


class ByteTokenizer:
    """One token for each byte, and one for the end of sequence."""

    is_tokenizer_wrapper, bos_token_id, eos_token_id, special_token_ids = True, None, END_OF_SEQUENCE, [END_OF_SEQUENCE]
    tokens = [bytes([value]) for value in range(256)] + [b"<|end|>"]

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())


tokenizer = LLTokenizer(ByteTokenizer(), slices=[])
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def after(text: bytes, *, attempt: bool = False) -> dict:
    """What the matcher says after each byte of the text, the last one offered with `try_consume_tokens` if this is an attempt."""
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA)), log_level=0)
    matcher.consume_tokens(list(text[:-1]))
    taken = matcher.try_consume_tokens([text[-1]]) if attempt else matcher.consume_token(text[-1])
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    allowed = [token for token in range(END_OF_SEQUENCE + 1) if mask >> token & 1]
    return {"taken": int(taken), "is_stopped": matcher.is_stopped(), "only_end_allowed": allowed == [END_OF_SEQUENCE],
            "is_accepting": matcher.is_accepting(), "is_error": matcher.is_error()}


print("llguidance", version("llguidance"))
complete, refused, attempted = after(b'{"a": 1}'), after(b'{"a": x'), after(b'{"a": x', attempt=True)
print("complete text:             ", complete)
print("refused, consume_token:    ", refused)
print("refused, try_consume_tokens:", attempted)
same = complete == {"taken": 1, "is_stopped": True, "only_end_allowed": True, "is_accepting": True, "is_error": False}
same = same and refused == {"taken": 0, "is_stopped": True, "only_end_allowed": True, "is_accepting": False, "is_error": True}
same = same and attempted == {"taken": 0, "is_stopped": False, "only_end_allowed": False, "is_accepting": False, "is_error": False}
print("as described" if same else "CHANGED")
raise SystemExit(0 if same else 1)
END
