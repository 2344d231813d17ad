"""Tokens to text, stop strings and chat templates."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.errors import InvalidRequest
from meshserve.roles.processor.choices import PlainChoice
from meshserve.roles.processor.detokenizing import Detokenizer, StopChecker, TokenTexts
from meshserve.roles.processor.templating import render_chat
from meshserve.wire.completion import EndItem


@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode), st.data())
def test_any_bytes_in_any_split_become_the_same_text(data: bytes, draw: st.DataObject) -> None:
    detokenizer = Detokenizer(lambda token: bytes([token]))
    texts, rest = [], list(data)
    while rest:
        size = draw.draw(st.integers(1, len(rest)))
        texts.append(detokenizer.feed(rest[:size]))
        rest = rest[size:]
    assert "".join([*texts, detokenizer.finish()]) == data.decode("utf-8", "replace")


@given(st.lists(st.binary(max_size=5) | st.text(max_size=3).map(str.encode), max_size=20), st.data())
def test_tokens_of_any_bytes_in_any_groups_become_the_same_text(pieces: list[bytes], draw: st.DataObject) -> None:
    detokenizer = Detokenizer(pieces.__getitem__)
    texts, rest = [], list(range(len(pieces)))
    while rest:
        size = draw.draw(st.integers(1, len(rest)))
        texts.append(detokenizer.feed(rest[:size]))
        rest = rest[size:]
    assert "".join([*texts, detokenizer.finish()]) == b"".join(pieces).decode("utf-8", "replace")


class Bytes:
    """A vocabulary of all bytes, and a few words."""

    pieces = (*(bytes([value]) for value in range(256)), b"", b" word", "\u00e9\u20ac".encode())
    eos_token = 256
    eos_tokens: tuple[int, ...] = (256,)
    vocab_size = len(pieces)

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token] if 0 <= token < self.vocab_size else b""


TOKEN_TEXTS = TokenTexts(Bytes())


@given(st.lists(st.integers(0, Bytes.vocab_size - 1), max_size=40), st.booleans(), st.data())
def test_a_plain_choice_says_one_piece_a_token_in_whatever_steps_they_come(tokens: list[int], is_bare: bool, draw: st.DataObject) -> None:
    said: list[Any] = []
    choice, rest = PlainChoice(said.append, said.extend, TOKEN_TEXTS, 3, is_bare), tokens
    while rest:
        size = draw.draw(st.integers(1, len(rest)))
        assert not choice.feed(rest[:size])
        rest = rest[size:]
    assert len(said) == len(tokens) == choice.num_tokens
    assert choice.finish("length") == EndItem(3, "length", None)
    texts = said if is_bare else [item.text for item in said if item.choice == 3]
    assert "".join(texts) == b"".join(map(Bytes().token_bytes, tokens)).decode("utf-8", "replace")


def by_character(text: str, stops: tuple[str, ...]) -> str:
    """What a reader does who looks at one character after the other."""
    for end in range(1, len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            return text[: end - max(map(len, matching))]
    return text


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple), st.data())
def test_stop_strings_end_the_text_in_the_same_place_however_it_is_split(text: str, stops: tuple[str, ...], draw: st.DataObject) -> None:
    checker, given_out, is_stopped, rest = StopChecker(stops), "", False, text
    expected = by_character(text, stops)
    while rest and not is_stopped:
        size = draw.draw(st.integers(1, len(rest)))
        safe, is_stopped = checker.feed(rest[:size])
        given_out, rest = given_out + safe, rest[size:]
        assert expected.startswith(given_out), "a part of a stop string leaked"
    assert given_out + ("" if is_stopped else checker.finish()) == expected


def test_a_chat_template_sees_the_messages_and_can_refuse_them() -> None:
    template = (
        "{% for message in messages %}{{ message.role }}={{ message.content }};{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert render_chat(template, [{"role": "user", "content": "hi"}]) == "user=hi;>"
    for bad in ("{{ raise_exception('no') }}", "{{ messages[0]", "{{ messages.__class__.__mro__[1].__subclasses__() }}"):
        with pytest.raises(InvalidRequest):
            render_chat(bad, [{"role": "user", "content": "hi"}])
