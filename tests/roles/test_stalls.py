"""Decode workers that live and make no progress on a request: another one takes the request over, and not too soon."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from meshserve.app import Peer
from meshserve.config import MeshConfig, ServeConfig
from meshserve.errors import GaveUp
from meshserve.mesh.calls import IncomingCall
from meshserve.roles.processor.stalls import Patience, Standing
from meshserve.wire.generation import GenerateRequest, Sampling
from meshserve.wire.messages import GENERATE, PROGRESS
from tests.harness import run_async, until
from tests.harness.waiting import pace_async
from tests.roles.scripted import DEADLINE_S, Scene, another_worker, scene, tokens
from tests.roles.test_continuing import Rest

TIMEOUT_S = 8.0
"""Of the tables: looks come every second."""


def looks(
    standings: Sequence[Standing | None],
    overdue_s: Mapping[int, float | None] | None = None,
    pauses_s: Mapping[int, float] | None = None,
) -> int:
    """The number of the look that finds the sequence stalled; -1 if none does. The worker answers at these looks, if it was asked."""
    patience, now_s = Patience(TIMEOUT_S), 100.0
    assert patience.pause_s == 1.0
    for number, standing in enumerate(standings):
        now_s += (pauses_s or {}).get(number, 1.0)
        verdict = patience.look({"r": standing} if standing is not None else {}, now_s)
        if verdict.stalled:
            return number
        if standing is not None and standing[0] in verdict.asked and number in (overdue_s or {}):
            patience.heard("r", standing[0], (overdue_s or {})[number])
    return -1


AT: Standing = ("w", 0, 3)


def test_a_sequence_without_a_token_for_longer_than_the_timeout_is_stalled() -> None:
    assert looks([AT] * 20) == 9
    assert looks([AT] * 9) == -1


def test_each_token_and_each_worker_begins_the_time_anew() -> None:
    assert looks([AT] * 6 + [("w", 0, 4)] * 9) == -1
    assert looks([AT] * 6 + [("w", 0, 4)] * 10) == 15
    assert looks([AT] * 6 + [("v", 1, 3)] * 9) == -1
    assert looks([AT] * 6 + [None] * 3 + [AT] * 9) == -1


def test_a_worker_that_expects_the_wait_is_believed() -> None:
    assert looks([AT] * 60, dict.fromkeys(range(60), 0.0)) == -1
    assert looks([AT] * 60, dict.fromkeys(range(19), 0.0)) == 27, "since it said so last"


def test_what_is_overdue_by_the_workers_own_word_counts_from_there() -> None:
    assert looks([AT] * 60, {number: max(0.0, number - 30.0) for number in range(60)}) == 39
    assert looks([AT] * 60, {number: number * 1.0 for number in range(60)}) == 9, "it never says more than was waited"


def test_a_worker_that_does_not_know_the_sequence_is_no_excuse() -> None:
    assert looks([AT] * 60, dict.fromkeys(range(60))) == 9


def test_a_worker_is_asked_about_a_sequence_only_once_no_token_came_for_a_while() -> None:
    patience = Patience(TIMEOUT_S)
    asked = [patience.look({"r": AT}, number * 1.0).asked for number in range(5)]
    assert asked == [{}, {}, {"w": ["r"]}, {"w": ["r"]}, {"w": ["r"]}]


def test_the_answer_of_a_worker_that_has_the_sequence_no_more_changes_nothing() -> None:
    patience = Patience(TIMEOUT_S)
    for number in range(20):
        verdict = patience.look({"r": AT}, number * 1.0)
        patience.heard("r", "another", 0.0)
        patience.heard("unknown", "w", 0.0)
    assert verdict.stalled == ["r"]


def test_time_in_which_this_process_stood_still_is_not_the_workers() -> None:
    assert looks([AT] * 6, pauses_s={4: 3600.0}) == -1


# --- with workers that are played by hand

STALL_TIMEOUT_S = 0.4


def answers(found: Scene, overdue_s: float | None) -> list[list[str]]:
    """Have the scene's own worker answer so for all that it is asked about; returns what it is asked."""
    asked: list[list[str]] = []

    def on_progress(call: IncomingCall) -> None:
        asked.append(call.body)
        call.end([overdue_s] * len(call.body))

    found.mesh.serve(PROGRESS, on_progress)
    return asked


@pytest.mark.parametrize("num_tokens", [0, 2])
def test_a_worker_that_lives_and_says_nothing_loses_its_request_and_its_late_tokens_are_refused(num_tokens: int) -> None:
    async def check() -> None:
        async with scene(stall_timeout_s=STALL_TIMEOUT_S) as found, another_worker(found, found.worker):
            client = found.ask(max_tokens=5, wants_receipt=True, wants_start=False)
            await found.worker.asked(1)
            found.worker.say(0, "ab"[:num_tokens], None)
            await found.worker.asked(2)
            await until(lambda: found.worker.cancelled == ["r"], DEADLINE_S, "the attempt is cancelled")
            found.worker.say(0, "late", "stop", position=num_tokens)
            found.worker.say(1, "abcde"[num_tokens:], position=num_tokens)
            ending = await client.end()
            assert "".join(client.raw) == "abcde"
            receipt: dict[str, Any] = ending.receipt or {}
            assert receipt["attempts"][0]["outcome"] == "no_progress" and receipt["migrations"] == (num_tokens > 0)
            assert found.mesh.counters.snapshot()["faults_stall"] == 1

    run_async(check())


def test_row_20_a_request_on_which_two_workers_hang_is_given_up() -> None:
    async def check() -> None:
        async with scene(stall_timeout_s=STALL_TIMEOUT_S) as found, another_worker(found, found.worker):
            assert isinstance(await found.ask(max_tokens=5).failure(), GaveUp)
            assert len(found.worker.calls) == 2 and found.processor.is_idle

    run_async(check())


@pytest.mark.parametrize(("overdue_s", "is_left"), [(0.0, False), (60.0, True), (None, True)])
def test_a_request_that_waits_as_its_worker_expects_stays_there(overdue_s: float | None, is_left: bool) -> None:
    async def check() -> None:
        async with scene(stall_timeout_s=STALL_TIMEOUT_S) as found:
            asked = answers(found, overdue_s)
            found.worker.opening = ""
            client = found.ask(max_tokens=5)
            await found.worker.asked(1)
            async with another_worker(found, found.worker):
                await until(lambda: len(asked) >= 20 or len(found.worker.calls) == 2, DEADLINE_S, "it waits for long, or goes elsewhere")
                assert (len(found.worker.calls) == 2) is is_left
                found.worker.say(-1, "abcde")
                await client.end()

    run_async(check())


def test_where_there_is_no_other_worker_a_stalled_request_stays_until_one_comes() -> None:
    async def check() -> None:
        async with scene(stall_timeout_s=STALL_TIMEOUT_S) as found:
            client = found.ask(max_tokens=5)
            await found.worker.asked(1)
            await pace_async(3 * STALL_TIMEOUT_S)
            assert found.worker.calls[0].is_open and not found.worker.cancelled and client.error is None
            async with another_worker(found, found.worker):
                await found.worker.asked(2)
                found.worker.say(1, "abcde")
                await client.end()

    run_async(check())


# --- what a decode worker answers



def test_a_worker_says_of_each_request_how_long_its_progress_is_overdue() -> None:
    async def check() -> None:
        config = MeshConfig(mesh="progress", roles=("decode",), interface="127.0.0.1", use_mdns=False)
        options = (("step_ms", "5"), ("max_batch", "1"))
        peer = Peer(config, ServeConfig(engine_options=options))
        await peer.start()
        try:
            sinks = [Rest(), Rest()]
            for name, sink in zip(("runs", "waits"), sinks, strict=True):
                asked = GenerateRequest(name, "dummy", tokens("ab"), Sampling(max_tokens=2000, ignore_eos=True))
                peer.mesh.open(peer.mesh.incarnation, GENERATE, asked, sink, 30.0)
            await until(lambda: bool(sinks[0].raw), DEADLINE_S, "one runs, and the other waits for it")
            runs, waits, unknown = await peer.mesh.call(peer.mesh.incarnation, PROGRESS, ["runs", "waits", "unknown"], DEADLINE_S)
            assert unknown is None and 0 <= runs < DEADLINE_S and 0 <= waits < DEADLINE_S
            assert not sinks[1].raw
        finally:
            await peer.stop()

    run_async(check())
