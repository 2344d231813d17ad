"""What a router answers to whoever asks it over the mesh, however he asks."""

from array import array

import pytest

from meshserve.errors import ProtocolError
from meshserve.wire.generation import pack_tokens
from tests.harness import run_async
from tests.routing.test_watches import DEADLINE_S, followed

QUESTION = {"request_id": "r", "model": "dummy", "tokens": pack_tokens(array("I", [1, 2, 3]))}
MALFORMED: list[dict[str, object]] = [
    {"request_id": 1},
    {"model": None},
    {"tokens": b"123"},
    {"policy": ["kv"]},
    {"policy": {"kv": 1}},
    {"session": 5},
    {"excluded": "w"},
    {"excluded": [["w"]]},
    {"excluded": [{}]},
]


def test_a_malformed_question_is_answered_with_what_is_wrong_and_the_next_one_with_a_worker() -> None:
    async def ask() -> None:
        async with followed() as pair:
            router = pair.router.incarnation
            for change in MALFORMED:
                with pytest.raises(ProtocolError):
                    await pair.worker.call(router, "route", {**QUESTION, **change}, DEADLINE_S)
            answer = await pair.worker.call(router, "route", QUESTION, DEADLINE_S)
            assert answer["decode"][0][0] == pair.worker.incarnation

    run_async(ask())
