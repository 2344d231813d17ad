"""The event feed: what is followed and what only counted, how many peers' batches become one stream, and that nothing runs unwatched."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.config import MeshConfig
from meshserve.errors import Overloaded, ProtocolError
from meshserve.mesh.mesh import Mesh
from meshserve.observe.latencies import latencies_by_worker
from meshserve.observe.mesh_feed import MAX_READERS, Merge, MeshFeed, Reader
from meshserve.observe.peer_feed import MAX_FOLLOWED, MAX_NEW_PER_S, Digest, FeedSource, Sample
from meshserve.telemetry import BUCKETS_S, Histograms
from meshserve.wire.observing import MAX_EVENTS, FeedBatch
from meshserve.wire.routing import WorkerLoad
from tests.harness import run_async, until


class Clock:
    """A clock that is put forward by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def result(outcome: str = "ok", num_tokens: int = 3) -> dict[str, Any]:
    return {"outcome": outcome, "num_tokens": num_tokens, "num_prompt_tokens": 100, "num_cached_tokens": 40}


def serve(digest: Digest, clock: Clock, request_id: str, step_s: float = 0.010) -> None:
    """What a peer with all roles notes of one request that was handed over; `step_s` for each token."""
    digest.heard("submit", request_id, {"num_tokens": 100})
    digest.heard("routed", request_id, {"decode": "d", "router": "r", "policy": "kv", "candidates": [{"peer": "d"}] * 9})
    digest.heard("accepted", request_id, {})
    digest.heard("ticket", request_id, {"attempt": 1, "peers": ["p"]})
    digest.heard("claim", request_id, {"attempt": 1, "peer_claiming": "p"})
    for index in range(7):
        digest.heard("block", request_id, {"attempt": 1, "peer_sending": "p", "index": index})
    digest.heard("handoff_ended", request_id, {"attempt": 1, "state": "done"})
    for position in range(3):
        clock.now_s += step_s
        digest.heard("tokens", request_id, {"position": position, "count": 1, "decode": "d"})
    digest.heard("left", request_id, {})
    digest.heard("result", request_id, result())


def test_a_followed_request_is_told_step_by_step_with_blocks_and_tokens_as_counts() -> None:
    clock = Clock()
    digest = Digest(clock)
    serve(digest, clock, "f-1")
    batch = digest.take()
    kinds = [event.kind for event in batch["events"]]
    assert kinds == ["submit", "routed", "accepted", "ticket", "claim", "blocks", "handoff_ended", "tokens", "result"]
    details = {event.kind: event.details for event in batch["events"]}
    assert details["blocks"] == {"count": 7, "peer_sending": "p"} and details["tokens"] == {"count": 3}
    assert len(details["routed"]["candidates"]) == 6 and details["routed"]["num_candidates"] == 9
    assert batch["ttft_ms"] == [10.0] and batch["itl_ms"] == [10.0]
    assert batch["counts"]["ok"] == 1 and batch["counts"]["tokens"] == 3 and batch["counts"]["cached_tokens"] == 40
    assert digest.take() == {}


def test_under_load_a_bounded_number_is_followed_and_all_are_counted() -> None:
    clock = Clock()
    digest = Digest(clock)
    told, counted = set(), 0
    for number in range(20_000):
        serve(digest, clock, f"f-{number}", 0.0005 / 3)
        if number % 200 == 0:
            batch = digest.take()
            assert len(batch.get("events", [])) <= MAX_EVENTS
            told |= {event.request_id for event in batch.get("events", [])}
            counted += batch["counts"]["ok"]
    counted += digest.take()["counts"]["ok"]
    assert counted == 20_000
    assert 0 < len(told) <= 12 * MAX_NEW_PER_S


def test_requests_that_never_end_do_not_fill_the_digest() -> None:
    clock = Clock()
    digest = Digest(clock)
    for number in range(1000):
        clock.now_s += 0.1
        digest.heard("submit", f"f-{number}", {"num_tokens": 1})
    digest.take()
    for number in range(1000):
        digest.heard("tokens", f"f-{number}", {"count": 1})
    assert len(digest.take()["events"]) == MAX_FOLLOWED
    clock.now_s += 1000
    digest.take()
    serve(digest, clock, "f-late")
    assert len(digest.take()["events"]) == 9


@pytest.mark.parametrize(("load", "share"), [(10, 2), (100, 2), (1000, 4), (3000, 10)])
def test_a_peer_that_sees_every_nth_request_follows_those_of_them_that_one_follows_who_sees_all(load: int, share: int) -> None:
    busy, quiet = Sample(MAX_NEW_PER_S, 0.0), Sample(MAX_NEW_PER_S, 0.0)
    num_followed = num_followed_there = 0
    for number in range(20 * load):
        name, now_s = f"f-{number}", number / load
        is_taken = busy.takes(name, now_s)
        if number % share == 0:
            is_taken_there = quiet.takes(name, now_s)
            num_followed += is_taken
            num_followed_there += is_taken and is_taken_there
    assert num_followed >= 10 and num_followed_there >= 0.9 * num_followed


@given(st.lists(st.tuples(st.integers(0, 10_000), st.floats(0, 0.01)), max_size=400))
def test_no_more_than_the_bound_is_followed_in_any_second(arrivals: list[tuple[int, float]]) -> None:
    sample, now_s, taken = Sample(MAX_NEW_PER_S, 0.0), 0.0, []
    for number, pause_s in arrivals:
        now_s += pause_s
        if sample.takes(f"f-{number}", now_s):
            taken.append(now_s)
    for second in range(int(now_s) + 1):
        assert sum(second <= at_s < second + 1 for at_s in taken) <= 2 * MAX_NEW_PER_S


def batch(*events: list[Any], **more: Any) -> FeedBatch:
    return FeedBatch.from_wire({"events": list(events), **more})


def kinds(update: dict[str, Any]) -> list[tuple[str, str]]:
    return [(event[2], event[3]) for event in update.get("events", [])]


def test_word_that_comes_before_a_requests_beginning_waits_for_it() -> None:
    merge = Merge(0.0)
    merge.add("decode", batch([5.0, "accepted", "f-1", {}]), 1.0)
    assert kinds(merge.take(1.0)) == []
    merge.add("front", batch([30.0, "submit", "f-1", {"num_tokens": 4}]), 1.02)
    assert kinds(merge.take(1.05)) == [("submit", "f-1"), ("accepted", "f-1")]


def test_word_of_requests_that_nobody_saw_begin_is_dropped() -> None:
    merge = Merge(0.0)
    for number in range(2000):
        merge.add("decode", batch([0.0, "accepted", f"f-{number}", {}]), 1.0)
    assert kinds(merge.take(1.0)) == []
    merge.add("front", batch([0.0, "submit", "f-new", {"num_tokens": 4}]), 1.0)
    assert kinds(merge.take(1.1)) == [("submit", "f-new")]


def test_word_that_comes_after_a_requests_end_is_still_told() -> None:
    merge = Merge(0.0)
    merge.add("front", batch([5.0, "submit", "f-1", {"num_tokens": 4}], [1.0, "result", "f-1", result()]), 1.0)
    merge.add("decode", batch([3.0, "accepted", "f-1", {}]), 1.0)
    assert kinds(merge.take(1.0)) == [("submit", "f-1"), ("accepted", "f-1"), ("result", "f-1")]
    assert merge.now()["events"] == []


def test_one_update_stays_small_whatever_many_peers_say() -> None:
    merge = Merge(0.0)
    for peer in range(50):
        events = [[1.0, "submit", f"f-{peer}-{number}", {"num_tokens": 4}] for number in range(200)]
        merge.add(f"front-{peer}", batch(*events, ttft_ms=[1.0] * 64), 1.0)
    update = merge.take(1.1)
    assert len(update["events"]) <= MAX_NEW_PER_S
    assert len(json.dumps(update)) < 64_000


def test_a_point_a_second_sums_up_all_peers() -> None:
    merge = Merge(0.0)
    merge.add("front", batch(counts={"submit": 10, "tokens": 50, "prompt_tokens": 100, "cached_tokens": 25}, ttft_ms=[1, 2, 9]), 0.5)
    merge.add("decode", batch(load={"num_waiting": 2, "num_running": 3}), 0.5)
    merge.add("prefill", batch(load={"num_tickets": 4}), 0.5)
    point = merge.take(1.0)["point"]
    assert point["requests_per_s"] == 10 and point["tokens_per_s"] == 50 and point["queued"] == 6 and point["running"] == 3
    assert point["ttft_ms"] == 2 and point["itl_ms"] is None and point["cached"] == 0.25
    assert merge.now()["history"] == [point]


def counted(**durations_s: float) -> FeedBatch:
    """A processor's batch: to the first token and between tokens, of workers by name."""
    histograms = Histograms()
    for worker, duration_s in durations_s.items():
        for name in ("ttft", "itl", "ttft"):
            histograms.parts[worker].named[name].observe(duration_s)
    return batch(latencies=latencies_by_worker(histograms.snapshot_parts()))


def test_a_workers_latencies_are_added_up_over_processors_and_told_when_they_change() -> None:
    merge = Merge(0.0)
    merge.add("front-1", counted(fast=0.004, slow=0.09), 0.5)
    merge.add("front-2", counted(slow=0.3), 0.5)
    found = merge.take(1.0)["latencies"]
    assert found["fast"] == {"ttft_ms": [3.75, 4.975], "itl_ms": [3.75, 4.975]}
    assert found["slow"]["ttft_ms"] == [100.0, 495.0]  # two of 50 to 100 ms, two of 250 to 500
    assert merge.now()["latencies"] == found and "latencies" not in merge.take(2.0)
    merge.forget("front-2")
    assert merge.take(3.0)["latencies"] == {"slow": {"ttft_ms": [75.0, 99.5], "itl_ms": [75.0, 99.5]}}
    merge.add("front-1", counted(fast=0.004), 3.5)  # the slow one died
    assert "latencies" not in merge.take(4.0) and merge.now()["latencies"].keys() == {"fast"}


def test_a_workers_latencies_are_those_of_the_last_half_minute() -> None:
    merge, histograms = Merge(0.0), Histograms()
    for second in range(1, 70):
        histograms.parts["w"].named["itl"].observe(0.09 if second < 20 else 0.004)
        merge.add("front", batch(latencies=latencies_by_worker(histograms.snapshot_parts())), second - 0.5)
        merge.take(float(second))
    assert merge.now()["latencies"] == {"w": {"itl_ms": [3.75, 4.975]}}


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {"events": 1},
        {"events": [[1.0, "submit", "f-1"]]},
        {"events": [[float("nan"), "submit", "f-1", {}]]},
        {"events": [[1.0, "submit", "f-1", {"payload": b"bytes"}]]},
        {"events": [[1.0, "submit", "f-1", {"deep": [[[[[[1]]]]]]}]]},
        {"counts": {"submit": "many"}},
        {"load": {"num_running": 1.5}},
        {"ttft_ms": [float("inf")]},
        {"latencies": []},
        {"latencies": {"w": [1]}},
        {"latencies": {"w": {"ttft": [1, 2]}}},
        {"latencies": {"w": {"itl": [-1] * (len(BUCKETS_S) + 1)}}},
        {"latencies": {str(number): {} for number in range(2000)}},
    ],
)
def test_a_malformed_batch_is_refused(data: Any) -> None:
    with pytest.raises(ProtocolError):
        FeedBatch.from_wire(data)


def test_a_reader_that_falls_behind_skips_to_the_state_as_it_is() -> None:
    async def read() -> None:
        reader = Reader(lambda: b"snapshot")
        reader.push(b"missed: the snapshot will say it")
        assert await reader.next() == b"snapshot"
        reader.push(b"one ")
        reader.push(b"two")
        assert await reader.next() == b"one two"
        for number in range(1000):
            reader.push(b"update %d" % number)
        assert await reader.next() == b"snapshot"
        reader.push(b"and on")
        assert await reader.next() == b"and on"
        reader.close()
        assert await reader.next() == b""

    run_async(read())


def config(*roles: str, seeds: tuple[str, ...] = ()) -> MeshConfig:
    return MeshConfig(mesh="feed", roles=roles, interface="127.0.0.1", use_mdns=False, seeds=seeds)


def state_of(message: bytes) -> dict[str, Any]:
    lines = dict(line.split(": ", 1) for line in message.decode().strip().split("\n"))
    assert lines["retry"] == "1000" and lines["event"] in ("snapshot", "update")
    state: dict[str, Any] = json.loads(lines["data"])
    return state


@dataclass
class Pair:
    """A worker and a frontend that follows the worker's event log."""

    worker: Mesh
    front: Mesh
    feed: MeshFeed

    def both_listen(self) -> bool:
        return self.worker.event_log.is_on and self.front.event_log.is_on

    def none_listens(self) -> bool:
        return not self.worker.event_log.is_on and not self.front.event_log.is_on


@asynccontextmanager
async def a_pair() -> AsyncIterator[Pair]:
    worker = Mesh(config("decode"))
    await worker.start()
    source = FeedSource(worker, lambda: WorkerLoad(num_running=5, num_blocks=9))
    await worker.join()
    front = Mesh(config("frontend", seeds=(f"127.0.0.1:{worker.own.port}",)))
    await front.start()
    own_source = FeedSource(front, None)
    feed = MeshFeed(front)
    await front.join()
    await until(lambda: front.peers_with("decode"), 5.0, "the frontend reaches the worker")
    try:
        yield Pair(worker, front, feed)
    finally:
        for part in (feed, source, own_source):
            part.close()
        for mesh in (front, worker):
            await mesh.close()


async def check_that_news_arrive(pair: Pair, reader: Reader) -> None:
    """Note an event at each peer, and read updates until the reader has both, the load and the latencies."""
    incarnation = pair.worker.incarnation
    pair.front.histograms.parts[incarnation].named["ttft"].observe(0.004)
    pair.front.event_log.note("submit", "f-1", num_tokens=4)
    pair.worker.event_log.note("accepted", "f-1")
    seen: list[str] = []
    loads: dict[str, Any] = {}
    latencies: dict[str, Any] = {}
    async with asyncio.timeout(60.0):
        while len(seen) < 2 or not loads or not latencies:
            update = state_of(await reader.next())
            seen += [event[2] for event in update.get("events", [])]
            loads |= update.get("loads", {})
            latencies |= update.get("latencies", {})
    assert seen == ["submit", "accepted"] and loads[incarnation]["num_running"] == 5
    assert latencies == {incarnation: {"ttft_ms": [3.75, 4.975]}}


def test_peers_listen_to_their_event_logs_only_while_somebody_reads() -> None:
    async def watch() -> None:
        async with a_pair() as pair:
            assert pair.none_listens()
            reader = pair.feed.join()
            first = state_of(await reader.next())
            assert {peer["state"] for peer in first["peers"]} == {"alive"} and len(first["peers"]) == 2
            await until(pair.both_listen, 5.0, "both listen")
            await check_that_news_arrive(pair, reader)

            others = [pair.feed.join() for _ in range(MAX_READERS - 1)]
            with pytest.raises(Overloaded):
                pair.feed.join()
            for one in [reader, *others]:
                pair.feed.leave(one)
            await until(pair.none_listens, 5.0, "nobody listens")

    run_async(watch())
