"""When a prompt is prefilled elsewhere: the rule alone, as a table."""

from typing import Any

import pytest

from meshserve.routing import policies
from meshserve.routing.policies import decide_handoff
from meshserve.wire.generation import HandoffDecision, WorkerAccount

TABLE: list[tuple[str, int, int | None, float | None, float | None, bool, tuple[bool, str]]] = [
    # what is the case, uncached tokens, floor, local_ms, remote_ms, whether sequences run here: what is decided
    ("nothing is measured, and the prompt is short", 256, None, None, None, False, (False, "short")),
    ("nothing is measured, and the prompt is long", 257, None, None, None, False, (True, "long")),
    ("only this worker measured", 300, None, 5000.0, None, False, (True, "long")),
    ("only the other measured", 100, None, None, 5.0, False, (False, "short")),
    ("all but the last token is here", 0, None, 500.0, 10.0, True, (False, "cached")),
    ("a short prompt, sooner there", 10, None, 60.0, 30.0, False, (True, "faster-there")),
    ("a short prompt, hardly sooner there", 10, None, 60.0, 41.0, False, (False, "short")),
    ("a long prompt, hardly sooner there", 300, None, 60.0, 41.0, False, (True, "long")),
    ("a long prompt, hardly later there", 300, None, 60.0, 79.0, False, (True, "long")),
    ("a long prompt, later there", 5000, None, 300.0, 330.0, False, (False, "faster-here")),
    ("later there, but streams run here", 5000, None, 300.0, 330.0, True, (True, "streams-run-here")),
    ("twice as late there, and streams run here", 5000, None, 300.0, 600.0, True, (True, "streams-run-here")),
    ("more than twice as late there, and streams run here", 5000, None, 300.0, 600.1, True, (False, "faster-here")),
    ("a short one may be worth it for the streams too", 20, None, 100.0, 150.0, True, (True, "streams-run-here")),
    ("at a user's floor, however slow it is here", 500, 500, 9000.0, 1.0, True, (False, "floor")),
    ("above a user's floor, not measured", 501, 500, None, None, False, (True, "long")),
    ("above a user's floor, which is under ours", 1, 0, None, None, False, (True, "long")),
    ("above a user's floor, about alike", 20, 10, 100.0, 110.0, False, (True, "long")),
    ("above a user's floor, later there", 501, 500, 100.0, 200.0, False, (False, "faster-here")),
]


@pytest.mark.parametrize("row", TABLE, ids=[row[0] for row in TABLE])
def test_the_expected_times_decide_and_a_length_where_they_say_nothing(row: tuple[Any, ...]) -> None:
    *arguments, expected = row[1:]
    assert decide_handoff(*arguments) == expected


def test_every_reason_is_explained_in_receipts() -> None:
    reasons = {row[-1][1] for row in TABLE} | {policies.NO_PEER[1], policies.QUEUE_FULL[1]}
    for reason in reasons:
        shown = HandoffDecision(True, reason, 12.3456, None).for_receipt()
        assert shown.pop("why")
        assert shown == {"decided": "handoff", "local_ms": 12.346, "remote_ms": None, "reason": reason}


def test_a_decision_crosses_the_wire_and_accounts_without_one_are_read() -> None:
    decision = HandoffDecision(False, "faster-here", 1.5, None)
    said = WorkerAccount(1.0, 2.0, 0.0, 3.0, 6.0, 7, None, decision)
    assert WorkerAccount.from_wire([*said[:-1], list(decision)]) == said
    assert WorkerAccount.from_wire(list(said[:-1])) == said._replace(decision=None)


@pytest.mark.parametrize("data", [1, [], [1, "long", None, None], [True, 5, None, None], [True, "long"]])
def test_a_decision_that_cannot_be_read_is_none(data: Any) -> None:
    assert HandoffDecision.from_wire(data) is None
