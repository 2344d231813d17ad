"""Constraints: exactly what they allow may come, the end only where the output is complete, and all of it from the tokens so far."""

import json
import random
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshserve.engines.constraints.constraint import Constraint, ConstraintCompiler
from meshserve.engines.tokenizers import EOS_TOKEN
from meshserve.errors import EngineFailed, InvalidRequest
from tests.engines.constraint_harness import (
    CASES,
    COMPILER,
    TOKENIZER,
    all_taken,
    allowed_tokens,
    check_valid,
    constraint_of,
    follows,
    text_of,
)
from tests.harness import run_command


@pytest.mark.parametrize(("schema", "allowed", "forbidden"), CASES.values(), ids=CASES)
def test_a_schema_allows_what_is_valid_and_nothing_else(schema: Any, allowed: list[str], forbidden: list[str]) -> None:
    for text in allowed:
        check_valid(schema, text)
        assert follows(constraint_of(schema), text), text
    for text in forbidden:
        assert not follows(constraint_of(schema), text), text


@pytest.mark.parametrize("text", ['{ "a":1}', '{"a" :1}', '{"a":  1}', '{\n"a":1}', '{"a":1 }', ' {"a":1}', '{"a":1,  "b":2}', '{"a":1\n}'])
def test_of_white_space_there_is_at_most_one_blank_after_a_comma_or_colon(text: str) -> None:
    schema = {"type": "object"}
    assert not follows(constraint_of(schema), text)
    assert follows(constraint_of(schema), '{"a": 1, "b":2,"c": [1, 2,3]}')


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(CASES)), st.integers(0, 2**32))
def test_the_mask_follows_from_the_tokens_so_far(name: str, seed: int) -> None:
    draw, constraint, tokens = random.Random(seed), constraint_of(CASES[name][0]), list[int]()
    while not constraint.must_end and len(tokens) < 60:
        allowed = allowed_tokens(constraint)
        if EOS_TOKEN in allowed:
            check_valid(CASES[name][0], text_of(tokens))
        assert len(constraint.allowed_mask()) == 4 * -(-TOKENIZER.vocab_size // 32)
        assert sum(byte.bit_count() for byte in constraint.allowed_mask()) == len(allowed)
        again = constraint_of(CASES[name][0])
        for token in tokens:
            again.take(token)
        assert again.allowed_mask() == constraint.allowed_mask()
        found = [token for token in allowed if token != EOS_TOKEN]
        if not found:
            break
        tokens.append(draw.choice(found))
        assert constraint.num_allowed([tokens[-1]]) == 1
        constraint.take(tokens[-1])
    if constraint.must_end:
        assert allowed_tokens(constraint) == [EOS_TOKEN]
        check_valid(CASES[name][0], text_of(tokens))


@pytest.mark.parametrize(
    ("constraint", "allowed", "forbidden"),
    [
        ({"choices": ("yes", "no", "not now")}, ["yes", "no", "not now"], ["y", "not", "not ", "maybe", "yes "]),
        ({"choices": ('quo"te\\', "a\nb", "grün 😀")}, ['quo"te\\', "a\nb", "grün 😀"], ["a", "gr"]),
        ({"choices": ("only",)}, ["only"], ["", "onl"]),
        ({"regex": r"\d{3}-[a-f]+"}, ["123-a", "000-abcdef"], ["12-a", "123-", "123-ag"]),
        ({"regex": "(yes|no)?"}, ["", "yes", "no"], ["ye", "yesno"]),
        ({"regex": "^anchored$"}, ["anchored"], ["^anchored$", "anchored "]),
    ],
)
def test_choices_and_regular_expressions_cover_the_whole_output(constraint: Any, allowed: list[str], forbidden: list[str]) -> None:
    for text in allowed:
        assert follows(COMPILER.compile(**constraint), text), text
    for text in forbidden:
        assert not follows(COMPILER.compile(**constraint), text), text


def test_a_choice_that_another_begins_with_may_end_or_go_on() -> None:
    constraint = all_taken(COMPILER.compile(choices=("no", "not now")), "no")
    assert not constraint.must_end
    assert allowed_tokens(constraint) == [ord("t"), EOS_TOKEN]
    assert all_taken(constraint, "t now").must_end


def test_a_token_that_is_not_allowed_is_refused_and_harms_nothing() -> None:
    constraint = all_taken(constraint_of({"type": "array"}), "[1")
    for token in (ord("x"), EOS_TOKEN, 300, TOKENIZER.vocab_size, 10**9, -1):
        with pytest.raises(InvalidRequest, match="does not follow") as refused:
            constraint.take(token)
        assert refused.value.param == "num_generated"
    assert all_taken(constraint, "]").must_end
    with pytest.raises(InvalidRequest, match="does not follow"):
        constraint.take(ord(" "))


def test_where_one_text_is_forced_it_is_written_as_the_model_would_write_it() -> None:
    pieces = [b"", *(bytes([value]) for value in range(1, 256)), b"na", b"name", b'{"']
    compiler = ConstraintCompiler(
        lambda: pieces, (0,), lambda text: [pieces.index(b"name")] if text.startswith("name") else [*text.encode()]
    )
    constraint = compiler.compile(json_schema=json.dumps({"type": "object", "properties": {"name": {}}, "required": ["name"]}))
    constraint.take(pieces.index(b'{"'))
    assert allowed_tokens(constraint) == [pieces.index(b"name")]
    constraint.take(pieces.index(b"na"))  # what another worker wrote otherwise counts as well
    assert ord("m") in allowed_tokens(constraint)


def test_every_end_of_sequence_ends_it() -> None:
    pieces = [bytes([value]) for value in range(256)] + [b"", b"", b"x"]
    constraint = ConstraintCompiler(lambda: pieces, (257, 256), str.encode).compile(choices=("x",))
    assert allowed_tokens(constraint) == [ord("x")]
    constraint.take(ord("x"))
    assert allowed_tokens(constraint) == [256, 257]


def test_what_is_compiled_is_kept_and_its_outputs_do_not_disturb_each_other() -> None:
    compiler = ConstraintCompiler(lambda: [TOKENIZER.token_bytes(token) for token in range(TOKENIZER.vocab_size)], (EOS_TOKEN,), str.encode)
    first = all_taken(compiler.compile(regex="ab+"), "ab")
    assert allowed_tokens(compiler.compile(regex="ab+")) == [ord("a")]
    for number in range(100):
        assert all_taken(compiler.compile(choices=(f"{number}",)), f"{number}").must_end
    assert allowed_tokens(first) == [ord("b"), EOS_TOKEN]


def test_a_grammar_that_grows_beyond_its_limits_fails_its_request_alone() -> None:
    inner: Any = {"type": "object"}
    for _ in range(3):
        inner = {"anyOf": [inner] * 8}
    constraint = constraint_of(inner)
    assert isinstance(constraint, Constraint)
    with pytest.raises((EngineFailed, InvalidRequest), match="cannot be followed further"):
        all_taken(constraint, '{"a": {"b": 1}}').allowed_mask()
    assert follows(constraint_of({"type": "object"}), "{}")


def test_the_grammar_library_is_loaded_with_the_first_constraint() -> None:
    code = "import sys, meshserve.app, meshserve.engines.dummy; print(sorted({'llguidance', 'numpy'} & sys.modules.keys()))"
    found = run_command([sys.executable, "-c", code], 20.0)
    assert (found.exit_code, found.stdout.strip()) == (0, "[]"), found
