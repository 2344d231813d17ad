#!/usr/bin/env bash
# llguidance 1.9.1 with jsonschema 4.25.1: text that the grammar of a schema accepts can fail the schema.
#
# One would guess: a grammar made from a JSON schema accepts a part of what the schema allows, and refuses to be made where it cannot keep
# a keyword. Grammar-constrained output needs no second check.
#
# What happens: the grammar keeps apart the names under `properties`, but a name under `additionalProperties` may come again, and each
# time counts. With `minProperties: 2` the text {"a": 1, "a": 2} is complete for the grammar. A JSON parser keeps the last one of equal
# keys, so the object has one property and is invalid.
#
# Why it matters: maps from free names to values are common in tool arguments, and small models repeat themselves. Values are lost without
# a word, and the promise "the output matches the schema" does not hold. Check the parsed result where a schema counts properties.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet llguidance==1.9.1 jsonschema==4.25.1

"$folder/venv/bin/python" - <<'END'
import json
from importlib.metadata import version

import jsonschema
from llguidance import LLMatcher, LLTokenizer


class ByteTokenizer:
    """One token for each byte, and one for the end of sequence."""

    is_tokenizer_wrapper, bos_token_id, eos_token_id, special_token_ids = True, None, 256, [256]
    tokens = [bytes([value]) for value in range(256)] + [b"<|end|>"]

    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())


tokenizer = LLTokenizer(ByteTokenizer(), slices=[])


def grammar_accepts(schema: dict, text: str) -> bool:
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0)
    assert not matcher.get_error() and not matcher.get_grammar_warnings()
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


def schema_accepts(schema: dict, text: str) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))


NAMED = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
FREE = {"type": "object", "minProperties": 2, "additionalProperties": {"type": "integer"}}
cases = [(NAMED, '{"a": 1, "a": 2}'), (FREE, '{"a": 1}'), (FREE, '{"a": 1, "b": 2}'), (FREE, '{"a": 1, "a": 2}')]
print("llguidance", version("llguidance"), "jsonschema", version("jsonschema"))
seen = []
for schema, text in cases:
    seen.append((grammar_accepts(schema, text), schema_accepts(schema, text)))
    print(f"{json.dumps(schema)}\n    {text}  parsed: {json.loads(text)}  grammar accepts: {seen[-1][0]}  schema accepts: {seen[-1][1]}")
same = seen == [(False, True), (False, False), (True, True), (True, False)]
print("as described" if same else "CHANGED")
raise SystemExit(0 if same else 1)
END
