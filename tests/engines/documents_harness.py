"""Documents written without an engine, and their judge."""

import json
import random
from typing import Any

import jsonschema

from meshserve.engines.dummy.documents import WrittenDocument, read_schema
from meshserve.engines.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()
MOST_TOKENS = 20_000


def text_of(tokens: list[int]) -> str:
    return b"".join(map(TOKENIZER.token_bytes, tokens)).decode()


def written(schema: Any, seed: int = 0) -> list[int]:
    """A document whose choices are drawn evenly."""
    document, draw, tokens = WrittenDocument(read_schema(json.dumps(schema))), random.Random(seed), list[int]()
    while offered := document.candidates():
        assert len(set(offered)) == len(offered)
        tokens.append(draw.choice(offered))
        document.take(tokens[-1])
        assert len(tokens) < MOST_TOKENS
    return tokens


def check_valid(schema: Any, text: str) -> None:
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
