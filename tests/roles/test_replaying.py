"""An answer that comes a second time: what is left out is what was given, however it was cut."""

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshserve.errors import AnswerDiffers, MeshserveError
from meshserve.roles.frontend import apis
from meshserve.roles.frontend.models.common import ResponseOptions
from meshserve.roles.frontend.replaying import Given, Replay
from meshserve.wire.completion import (
    CallItem,
    CompletionRequest,
    Ending,
    EndItem,
    Item,
    PartItem,
    StartItem,
    TextItem,
)
from meshserve.wire.structs import plain

ENDING = Ending("stop", 5, 3, 2)
Tokens = Sequence[tuple[str, Item | None]]
"""Of one choice: the text of each token, or what comes between two of them."""


class Kept:
    """The sink behind a replay. What it gets is given and settled at once, as in a long stream."""

    def __init__(self, given: Given | None = None) -> None:
        self.given = given or Given()
        self.items: list[Any] = []
        self.ending: Any = None
        self.error: MeshserveError | None = None
        self.num_resumed = 0

    def on_item(self, item: Any) -> None:
        self.on_items([item])

    def on_items(self, items: list[Any]) -> None:
        self.items += items
        self.given.items += items
        self.given.settle()

    def on_end(self, value: Any) -> None:
        self.ending = value

    def on_error(self, error: MeshserveError) -> None:
        self.error = error

    def stop(self, error: MeshserveError) -> None:
        self.error = error

    def resumed(self) -> None:
        self.num_resumed += 1


def items_of(tokens: Tokens, choice: int, rng: random.Random, has_logprobs: bool) -> list[Item]:
    """One way to give a choice out: text in pieces of any number of tokens."""
    found: list[Item] = []
    text, entries, starts, place = "", list[Any](), list[int](), 0

    def piece_of_text() -> TextItem:
        return TextItem(
            choice, text, entries if has_logprobs else None, starts if has_logprobs else None
        )

    for piece, between in [*tokens, ("", EndItem(choice, "stop"))]:
        if between is not None:
            if text or entries:
                found.append(piece_of_text())
            found.append(between)
            text, entries, starts = "", [], []
            continue
        text, entries, starts = (
            text + piece,
            [*entries, [piece.encode(), -0.5, []]],
            [*starts, place],
        )
        place += len(piece)
        if rng.random() < 0.6:
            found.append(piece_of_text())
            text, entries, starts = "", [], []
    return found


def mixed(choices: list[list[Item]], rng: random.Random) -> list[Item]:
    """The items of all choices, in any order but for that within each."""
    left = [list(reversed(items)) for items in choices]
    found: list[Item] = [StartItem(5)]
    while any(left):
        found.append(rng.choice([items for items in left if items]).pop())
    return found


def spoken(items: list[Any], num_choices: int, has_logprobs: bool) -> Any:
    """What a client gets of these items."""
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hi"}],
        "n": num_choices,
        "logprobs": 0 if has_logprobs else -1,
    }
    made = apis.CHATS.writer(
        7,
        CompletionRequest(request_id="a-1", kind="chat", model="m", **fields),
        ResponseOptions(False),
    )
    made.feed(items)
    return json.loads(made.end(ENDING))


def replayed(first: list[Any], second: list[Any]) -> Kept:
    """What is new in the second answer, once the first items were given."""
    before = Given()
    before.items += first
    kept = Kept(before)
    replay = Replay(before, kept, kept.resumed)
    for item in second:
        replay.on_item(item)
    if kept.error is None:
        replay.on_end(ENDING)
    return kept


def openings(choice: int) -> st.SearchStrategy[Item]:
    kinds = st.sampled_from(["text", "reasoning"]).map(lambda kind: PartItem(choice, kind))
    return kinds | st.sampled_from(["f", "g"]).map(lambda name: CallItem(choice, name))


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[Tokens], bool]:
    num_choices = draw(st.integers(1, 3))
    pieces = st.text("abé€ ", min_size=0, max_size=3)
    choices: list[Tokens] = []
    for choice in range(num_choices):
        between = st.tuples(st.just(""), openings(choice))
        choices.append(draw(st.lists(st.tuples(pieces, st.none()) | between, max_size=12)))
    return choices, draw(st.booleans())


@settings(max_examples=100, deadline=None)
@given(answers(), st.randoms(use_true_random=False), st.floats(0, 1), st.booleans())
def test_nothing_is_missing_and_nothing_is_doubled(
    answer: tuple[list[Tokens], bool], rng: random.Random, share: float, is_wire: bool
) -> None:
    choices, has_logprobs = answer

    def once() -> list[Any]:
        items = mixed(
            [items_of(tokens, choice, rng, has_logprobs) for choice, tokens in enumerate(choices)],
            rng,
        )
        return [plain(item) for item in items] if is_wire else items

    first, second = once(), once()
    first = first[: round(share * len(first))]
    kept = replayed(first, second)
    assert kept.error is None and kept.ending is ENDING and kept.num_resumed == 1
    assert spoken(first + kept.items, len(choices), has_logprobs) == spoken(
        second, len(choices), has_logprobs
    )


def test_plain_text_is_cut_within_an_item() -> None:
    kept = replayed(["ab", "", "c"], ["abcd", "e"])
    assert [item.text for item in kept.items] == ["d", "e"] and kept.ending is ENDING


def test_a_replay_may_be_lost_too_and_the_next_one_goes_on_from_what_the_client_has_then() -> None:
    before = Given()
    before.items += ["ab"]
    kept = Kept(before)
    Replay(before, kept, kept.resumed).on_items(["a", "bc"])
    Replay(before, kept, kept.resumed).on_items(["abc", "d"])
    assert "".join(item.text for item in kept.items) == "cd"


def test_log_probabilities_and_calls_that_are_new_are_not_compared_with_themselves() -> None:
    tokens = [TextItem(0, "x", [[b"x", -0.5, []]], [place]) for place in range(9)]
    calls = [item for name in "fgf" for item in (CallItem(0, name), TextItem(0, "{}"))]
    answer: list[Item] = [*tokens, *calls, EndItem(0, "tool_calls")]
    for num_given in range(len(answer)):
        kept = replayed(answer[:num_given], answer)
        assert kept.error is None and kept.items == answer[num_given:]


def test_nothing_is_called_new_before_all_came_again() -> None:
    before, kept = Given(), Kept()
    before.items += ["abc"]
    replay = Replay(before, kept, kept.resumed)
    replay.on_items(["a", "b"])
    assert kept.num_resumed == 0
    replay.on_items(["c", "d"])
    replay.on_item("e")
    assert kept.num_resumed == 1


DIFFERENT: dict[str, tuple[list[Any], list[Any]]] = {
    "another text": (["ab"], ["ax"]),
    "a shorter text": (["abc"], ["ab"]),
    "no text": (["abc"], []),
    "another kind of text": ([TextItem(0, "a")], [PartItem(0, "reasoning"), TextItem(0, "a")]),
    "another call": ([CallItem(0, "f"), TextItem(0, "{")], [CallItem(0, "g"), TextItem(0, "{")]),
    "a call that is missing": (
        [TextItem(0, "a"), CallItem(0, "f")],
        [TextItem(0, "a"), EndItem(0, "stop")],
    ),
    "an end that is missing": ([TextItem(0, "a"), EndItem(0, "stop")], [TextItem(0, "a")]),
    "another end": (
        [TextItem(0, "a"), EndItem(0, "stop")],
        [TextItem(0, "a"), EndItem(0, "length")],
    ),
    "an end that is too early": ([TextItem(0, "ab")], [TextItem(0, "a"), EndItem(0, "stop")]),
    "log probabilities that are missing": (
        [TextItem(0, "a", [[b"a", -0.5, []]], [0])],
        [TextItem(0, "a", [], [])],
    ),
    "a choice that is missing": ([TextItem(1, "a")], [TextItem(0, "a")]),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_an_answer_that_differs_is_never_mixed_with_the_first(case: str) -> None:
    kept = replayed(*DIFFERENT[case])
    assert isinstance(kept.error, AnswerDiffers) and kept.ending is None


def test_what_no_processor_may_say_ends_the_answer() -> None:
    kept = replayed(["a"], [["nonsense"]])
    assert kept.error is not None and kept.error.code == "protocol_error"
