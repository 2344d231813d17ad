"""Workers with a fault, which say what no sound worker says: the request goes elsewhere or ends in a clear error, and the mesh goes on."""

import json
import logging
import math
from typing import Any

import pytest

from meshserve.errors import GaveUp, MeshserveError
from meshserve.roles.processor.doubts import NewTokens, is_end, tokens_in
from meshserve.wire.completion import TextItem
from meshserve.wire.generation import GenerationEnd, WorkerAccount
from tests.harness import run_async
from tests.roles.scripted import Scene, Worker, another_worker, scene

ACCOUNT = [0.0] * 5
LOGPROBS = [[-0.5, [[65, -0.5]]]]


@pytest.mark.parametrize(
    ("item", "is_first", "found"),
    [
        ([3, 65, 66], False, NewTokens([3, 65, 66])),
        ([[3, 65], LOGPROBS], False, NewTokens([3, 65], LOGPROBS)),
        ([ACCOUNT, 3, 65], True, NewTokens([3, 65], None, ACCOUNT)),
        ([ACCOUNT, [3, 65], LOGPROBS], True, NewTokens([3, 65], LOGPROBS, ACCOUNT)),
        ([ACCOUNT, 3, 65], False, "item"),
        ([2, 65], False, "order"),
        ([4, 65], False, "order"),
        ([3, 65, 66, 67], False, "excess"),
        ([3], False, "item"),
        ([], False, "item"),
        ([True, 65], False, "item"),
        ([math.nan, 65], False, "item"),
        ({"tokens": [65]}, False, "item"),
        (None, True, "item"),
        ([[], []], True, "item"),
    ],
)
def test_an_item_has_tokens_that_follow_those_before_or_a_kind_of_fault(item: Any, is_first: bool, found: Any) -> None:
    assert tokens_in(item, 3, 5, is_first=is_first) == found


@pytest.mark.parametrize(
    ("reason", "said", "num_tokens", "is_believed"),
    [
        ("stop", 3, 3, True),
        ("stop", 0, 0, True),
        ("length", 5, 5, True),
        ("stop", 4, 3, False),
        ("stop", 2, 3, False),
        ("length", 3, 3, False),
        ("length", 0, 0, False),
        ("stop", None, 3, True),
        ("stop", None, 0, False),
        ("length", None, 0, False),
    ],
)
def test_an_end_is_believed_where_all_tokens_have_come(reason: str, said: int | None, num_tokens: int, is_believed: bool) -> None:
    assert is_end(GenerationEnd(reason, None, said), num_tokens, 5) is is_believed


# --- of a whole stream

STEPS: dict[str, tuple[str, list[Any]]] = {
    "an end before any token": ("end", [{"reason": "stop"}]),
    "an end that says more tokens than came": ("end", [[0, 65], {"reason": "stop", "num_tokens": 2}]),
    "an end of another shape": ("error", [[0, 65], {"reason": "banana"}]),
    "more tokens than asked": ("excess", [[0, 65, 66, 67, 68, 69, 70]]),
    "a position that repeats": ("order", [[0, 65, 66], [1, 66]]),
    "a gap": ("order", [[0, 65], [2, 66]]),
    "a token beyond the vocabulary": ("token", [[0, 65], [1, 2**31]]),
    "a first token beyond the vocabulary": ("token", [[0, 2**31]]),
    "a token that is negative": ("token", [[0, -1]]),
    "a token that is no number": ("token", [[0, "A"]]),
    "a token that is not whole": ("token", [[0, 65.0]]),
    "an item that is a number": ("item", [[0, 65], 7]),
    "an item that is a map": ("item", [[0, 65], {"a": None}]),
    "an item of nothing": ("item", [[]]),
    "log probabilities that are NaN": ("token", [[[0, 65], [[math.nan, []]]]]),
    "an error whose code is no text": ("error", [[0, 65], ("said", {"code": [1], "message": "x"})]),
    "an error that is empty": ("error", [("said", {})]),
    "an error with a malformed detail": ("error", [("said", {"code": "overloaded", "message": "x", "details": {"retry_after_s": -1}})]),
}
WHOLE = "ABCDE"


class Said(MeshserveError):
    """An error that crosses the wire as the test has it."""

    def __init__(self, data: Any) -> None:
        super().__init__()
        self.data = data

    def to_wire(self) -> dict[str, Any]:
        found: dict[str, Any] = self.data
        return found


async def say(worker: Worker, index: int, steps: list[Any]) -> None:
    """Items; an end, which is a map with a reason; an error, as it stands on the wire."""
    await worker.asked(index + 1)
    call = worker.calls[index]
    for step in steps:
        if isinstance(step, tuple):
            call.fail(Said(step[1]))
        elif isinstance(step, dict) and "reason" in step:
            call.end(step)
        else:
            call.send(step)


def faults(found: Scene) -> dict[str, int]:
    return {name: times for name, times in found.mesh.counters.snapshot().items() if name.startswith("faults_")}


async def say_the_rest(worker: Worker, index: int) -> None:
    """What a sound worker says from where the request stands."""
    request = (await worker.asked(index + 1))[index]
    so_far = request.num_generated
    assert list(request.tokens[len(request.tokens) - so_far :]) == list(WHOLE[:so_far].encode())
    if request.sampling.logprobs >= 0:
        for place in range(so_far, len(WHOLE)):
            worker.calls[index].send([[place, ord(WHOLE[place])], [[-0.5, []]]])
        worker.calls[index].end({"reason": "stop", "num_tokens": len(WHOLE), "account": WorkerAccount()})
    else:
        worker.say(index, WHOLE[so_far:], position=so_far)


@pytest.mark.parametrize("case", STEPS)
def test_what_a_worker_with_a_fault_says_sends_its_request_to_another(case: str, caplog: pytest.LogCaptureFixture) -> None:
    kind, steps = STEPS[case]

    async def check() -> None:
        async with scene() as found, another_worker(found, found.worker):
            asked = {"logprobs": 0} if "log" in case else {}
            client = found.ask(max_tokens=5, wants_receipt=True, **asked)
            await say(found.worker, 0, steps)
            await say_the_rest(found.worker, 1)
            ending = await client.end()
            said = [item for item in client.items if isinstance(item, (str, TextItem))]
            assert "".join(item if isinstance(item, str) else item.text for item in said) == WHOLE
            assert (ending.reason, ending.num_completion_tokens) == ("stop", 5)
            json.dumps(ending.receipt, allow_nan=False)
            assert ending.receipt is not None and ending.receipt["attempts"][0]["outcome"] == "protocol_error"
            assert faults(found) == {f"faults_{kind}": 1}

    with caplog.at_level(logging.WARNING):
        run_async(check())
    assert len([record for record in caplog.records if "needs an upgrade" in record.message]) == 1


def test_row_20_two_workers_in_a_row_that_say_nonsense_before_a_token_end_the_request() -> None:
    async def check() -> None:
        async with scene() as found, another_worker(found, found.worker) as one:
            client = found.ask(max_tokens=5)
            await say(one, 0, [{"reason": "stop"}])
            await say(one, 1, [[0, 2**31]])
            error = await client.failure()
            assert isinstance(error, GaveUp) and len(error.lost_peers) == 2 and len(one.calls) == 2
            assert found.processor.is_idle

    run_async(check())


def test_the_only_worker_of_a_model_has_its_fault_told_to_the_client() -> None:
    async def check() -> None:
        async with scene() as found:
            client = found.ask(max_tokens=5)
            await say(found.worker, 0, [{"reason": "stop"}])
            error = await client.failure()
            assert error.code == "protocol_error" and "ended a sequence that was not at its end" in error.message

    run_async(check())


def test_a_fault_that_repeats_is_counted_each_time_and_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with scene() as found:
            for number in range(20):
                client = found.ask(request_id=f"r{number}", max_tokens=5)
                await say(found.worker, number, [{"reason": "stop"}])
                await client.failure()
            assert faults(found) == {"faults_end": 20}

    with caplog.at_level(logging.WARNING):
        run_async(check())
    assert len([record for record in caplog.records if "needs an upgrade" in record.message]) == 1


def test_tokens_of_an_answer_that_has_all_that_was_asked_for_end_it_whatever_comes_then() -> None:
    async def check() -> None:
        async with scene() as found:
            client = found.ask(max_tokens=5)
            await say(found.worker, 0, [[0, *WHOLE.encode()], [5, 70]])
            assert (await client.end()).reason == "length" and "".join(client.raw) == WHOLE
            assert faults(found) == {"faults_excess": 1}

    run_async(check())


def test_an_echo_is_said_once_though_the_first_worker_has_a_fault() -> None:
    async def check() -> None:
        async with scene() as found, another_worker(found, found.worker) as one:
            client = found.ask(prompt="hi ", echo=True, max_tokens=5)
            await say(one, 0, [[0, 2**31]])
            await say_the_rest(one, 1)
            await client.end()
            assert "".join(client.raw) == "hi " + WHOLE

    run_async(check())
