"""Receipts as arithmetic: phases partition the time whatever peers say, and what is kept, drawn and exported of them."""

import json
from dataclasses import asdict
from time import monotonic
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from meshserve.cli.trace import waterfall
from meshserve.observe.otlp import export_body, receipt_spans
from meshserve.observe.receipts import PHASES, FrontendReceipt, PhaseTimes, Receipt, after_first_token, merged, partition, with_frontend
from meshserve.roles.processor.accounts import Account
from meshserve.telemetry import Histograms
from meshserve.wire.completion import TraceContext, read_traceparent
from meshserve.wire.generation import HandedOver, HandoffDecision, WorkerAccount, milliseconds
from meshserve.wire.routing import Candidate

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

times = st.floats(0, 1e6)
phases = st.dictionaries(st.sampled_from(PHASES[:-1]), times)
hostile = st.one_of(st.floats(), st.integers(), st.text(max_size=3), st.none(), st.booleans(), st.lists(st.integers(), max_size=2))


def assert_partition(found: dict[str, float], total_ms: float) -> None:
    """No phase is negative, and to the microsecond they are all there is."""
    assert list(found) == list(PHASES)
    assert all(value >= 0 for value in found.values())
    assert sum(round(value * 1000) for value in found.values()) == round(total_ms * 1000)


@given(phases, times)
def test_phases_partition_the_total_to_the_microsecond(measured: dict[str, float], total_ms: float) -> None:
    found = partition(measured, total_ms)
    assert_partition(found, total_ms)
    if sum(measured.values()) <= total_ms:
        assert all(found[phase] >= value - 0.001 for phase, value in measured.items()), "nothing that was measured is lost"


@given(st.dictionaries(st.sampled_from(PHASES), hostile), hostile)
def test_no_clock_of_another_peer_breaks_the_partition(said: dict[str, Any], total_ms: Any) -> None:
    assert_partition(partition(said, total_ms), milliseconds(total_ms))


@given(phases, times, st.dictionaries(st.sampled_from(("total_ms", "http_ms", "queue_ms", "call_ms")), times))
def test_with_the_frontends_part_they_partition_what_the_frontend_measured(
    measured: dict[str, float], total_ms: float, part: dict[str, float]
) -> None:
    receipt = Receipt("r", "", "m", phases_ms=PhaseTimes(**measured), total_ms=total_ms).to_wire()
    found = with_frontend(receipt, {"frontend": "f", **part})
    assert_partition(found["phases_ms"], part.get("total_ms", 0.0))
    assert found["peers"]["frontend"] == "f"


@given(st.lists(st.floats(0, 10), min_size=5, max_size=5), st.integers(0, 4))
def test_a_frontends_part_adds_up_wherever_its_request_ended(gaps_s: list[float], num_reached: int) -> None:
    front, at_s = FrontendReceipt("r", "", 100.0), 100.0
    for name, gap_s in zip(("asked_s", "passed_s", "answered_s", "ended_s")[:num_reached], gaps_s, strict=False):
        at_s += gap_s
        setattr(front, name, at_s)
    front.ended_s = at_s
    part = front.to_wire("f")
    assert part["total_ms"] == pytest.approx(part["http_ms"] + part["queue_ms"] + part["call_ms"])
    assert all(part[name] >= 0 for name in ("http_ms", "queue_ms", "call_ms"))


@given(phases, phases, times)
def test_a_later_answers_wait_is_what_the_first_one_did_then(first: dict[str, float], own: dict[str, float], waited_ms: float) -> None:
    found = asdict(after_first_token(PhaseTimes(**first), waited_ms, PhaseTimes(**own)))
    assert sum(found.values()) == pytest.approx(sum(own.values()) + waited_ms)
    assert all(found[phase] >= value for phase, value in own.items())


def test_several_answers_make_one_receipt_that_names_who_served_each() -> None:
    receipts = [Receipt(f"r/{index}", "", "m", num_completion_tokens=index, num_blocks=1) for index in range(3)]
    receipts[1].decode = "other"
    whole = merged(receipts, "r", 7, 2).to_wire()
    assert whole["tokens"] == {"prompt": 7, "cached": 2, "completion": 3} and whole["kv"]["blocks"] == 3
    assert [choice["decode"] for choice in whole["choices"]] == [None, "other", None]


def new_account(histograms: Histograms | None = None) -> Account:
    now_s = monotonic()
    return Account(Receipt("r", "", "m"), now_s, now_s, histograms, str)


def test_a_call_that_ends_without_an_account_counts_what_its_worker_said_before_the_first_token() -> None:
    account = new_account(Histograms())
    account.now_in = "call"
    account.early = WorkerAccount(queue_ms=1.0, num_cached_tokens=3, handed_over=HandedOver("p", [], 0, 0))
    last_s = account.first_token("w")
    account.close(last_s)
    receipt = account.receipt
    assert receipt.prefill == "p" and receipt.num_cached_tokens == 3 and receipt.phases_ms.decode > 0
    assert receipt.phases_ms.queue == 1.0 and account.settle() == 0.0


def test_a_call_that_came_to_nothing_was_waiting() -> None:
    account = new_account()
    account.now_in = "route"
    account.settle()
    account.now_in = "call"
    took_ms = account.settle()
    assert account.receipt.phases_ms.queue == took_ms > 0 and account.receipt.phases_ms.route > 0


def test_what_a_worker_said_twice_counts_once() -> None:
    account = new_account()
    account.now_in = "call"
    account.early = [2.0, 3.0, 0.0, 0.0, 5.0, 0, [None, [{"peer": "p"}], 0, 0]]
    account.first_token("w")
    account.call_ended([2.0, 4.0, 0.0, 1.0, 7.0, 0, None])
    assert account.receipt.phases_ms == PhaseTimes(queue=2.0, prefill=4.0, decode=1.0)
    assert account.receipt.attempts == [{"peer": "p"}]


def test_bytes_are_counted_whatever_their_number() -> None:
    account = WorkerAccount.from_wire([0.0, 0.0, 0.0, 0.0, 0.0, 3, [None, [], 7, 5_000_000_000]])
    assert account == WorkerAccount(num_cached_tokens=3, handed_over=HandedOver(None, [], 7, 5_000_000_000))


@given(hostile | st.lists(hostile | st.lists(hostile, min_size=4, max_size=4), max_size=9), st.booleans())
def test_an_account_of_any_form_does_no_harm(said: Any, is_complete: bool) -> None:
    account = new_account()
    account.now_in = "call"
    account.early = said
    account.first_token("w")
    if is_complete:
        account.call_ended(said)
    else:
        account.settle()
    assert_partition(account.receipt.to_wire()["phases_ms"], 0.0)


# --- traces


@pytest.mark.parametrize(
    ("text", "is_sampled"),
    [
        (TRACEPARENT, True),
        (TRACEPARENT[:-1] + "0", False),
        ("01" + TRACEPARENT[2:] + "-more", True),
        (TRACEPARENT + "-more", None),
        ("ff" + TRACEPARENT[2:], None),
        (TRACEPARENT.upper(), None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        ("", None),
    ],
)
def test_a_traceparent_is_read_as_the_standard_says_and_else_ignored(text: str, is_sampled: bool | None) -> None:
    found = read_traceparent(text)
    assert (found.is_sampled if found else None) == is_sampled
    assert found is None or found.trace_id == "4bf92f3577b34da6a3ce929d0e0e4736"


@given(phases, times)
def test_the_spans_of_a_request_lie_one_after_the_other_within_it(measured: dict[str, float], total_ms: float) -> None:
    own = TraceContext("a" * 32, "b" * 16)
    receipt = Receipt("r", "", "m", phases_ms=PhaseTimes(**measured), total_ms=total_ms, outcome="peer_lost", error="gone")
    whole, *parts = receipt_spans(receipt, 10**18, own, "c" * 16)
    assert whole["parentSpanId"] == "c" * 16 and whole["status"] == {"code": 2, "message": "gone"}
    last_ns = int(whole["startTimeUnixNano"])
    for span in parts:
        assert span["parentSpanId"] == own.span_id and int(span["startTimeUnixNano"]) == last_ns < int(span["endTimeUnixNano"])
        last_ns = int(span["endTimeUnixNano"])
    assert last_ns <= int(whole["endTimeUnixNano"]) + 2000  # both totals are rounded to a microsecond
    assert json.loads(json.dumps(export_body([whole, *parts], {"service.name": "meshserve"}, "1")))["resourceSpans"]


# --- how it is drawn


def a_receipt(**fields: Any) -> dict[str, Any]:
    candidates = [Candidate(f"{number}", f"worker-{number}", number, number, 1.5, 2.5, "about as good") for number in range(40)]
    receipt = Receipt("r", "label", "m", candidates=candidates, prefill_candidates=candidates, total_ms=100.0, outcome="ok", **fields)
    receipt.phases_ms = PhaseTimes(process=10.0, prefill=40.0, decode=49.0)
    receipt.processor, receipt.decode, receipt.prefill = "front", "worker-1", "worker-2"
    receipt.attempts = [{"peer": "worker-2", "outcome": "done", "ms": 3.0, "blocks": 4}]
    found = receipt.to_wire()
    return {**found, "peers": {**found["peers"], "frontend": "front"}}


@pytest.mark.parametrize(("width", "height"), [(80, 23), (200, 49)])
def test_a_waterfall_fits_its_terminal_and_keeps_the_best_candidates(width: int, height: int) -> None:
    lines = [line.plain for line in waterfall(a_receipt(), width, height)]
    assert len(lines) <= height and all(cell_len(line) <= width for line in lines)
    assert any("worker-0" in line for line in lines) and any("of 40)" in line for line in lines)


def test_bars_begin_where_the_one_before_ended() -> None:
    lines = [line.plain for line in waterfall(a_receipt(), 120)]
    bars = [line.rstrip() for line in lines if line.startswith(("process", "prefill ", "decode "))]
    ends = [len(bar) for bar in bars]
    starts = [next(at for at, letter in enumerate(bar) if letter in "▏▎▍▌▋▊▉█") for bar in bars]
    assert starts == sorted(starts) and all(abs(start - end) <= 1 for start, end in zip(starts[1:], ends, strict=False))


def test_where_the_prompt_was_prefilled_is_told_with_both_expected_times() -> None:
    told = [
        next(str(line) for line in waterfall(a_receipt(decision=decision), 100) if str(line).startswith("handoff"))
        for decision in (HandoffDecision(True, "faster-there", 81.26, 12.0), HandoffDecision(False, "short"))
    ]
    assert "handoff, faster-there: 81.3 ms here, 12.0 ms with a handoff" in told[0]
    assert "local, short: unknown here, unknown with a handoff" in told[1]
    assert not any(str(line).startswith("handoff") for line in waterfall(a_receipt(), 100))


def test_workers_that_went_on_with_the_output_of_lost_ones_are_told_with_the_pause() -> None:
    first = {"from": "worker-3", "to": "worker-4", "outcome": "peer_lost", "position": 17, "pause_ms": 12.345}
    second = {"from": "worker-4", "to": "worker-1", "outcome": "peer_silent", "position": 40, "pause_ms": 1501.0}
    receipt = a_receipt(continuations=[first, second])
    assert receipt["migrations"] == 2 and receipt["continuations"] == [first, second]
    (told,) = [line.plain for line in waterfall(receipt, 200) if line.plain.startswith("went on")]
    assert "worker-3 > worker-4 after 17 tokens, 12.3 ms pause (peer_lost); worker-4 > worker-1 after 40 tokens, 1501.0 ms" in told
    assert not any(line.plain.startswith("went on") for line in waterfall(a_receipt(), 200))


@given(st.text(max_size=20), st.text(max_size=20))
def test_nothing_in_a_receipt_steers_the_terminal(name: str, reason: str) -> None:
    receipt = a_receipt()
    receipt |= {"client_id": name, "error": reason, "outcome": "ok", "peers": dict.fromkeys(receipt["peers"], name)}
    receipt["candidates"] = [{**receipt["candidates"][0], "peer": name, "reason": reason}]
    receipt["handoff"] = {"decided": name, "reason": reason, "local_ms": name, "remote_ms": 1.0, "why": reason}
    assert all(line.plain.isprintable() for line in waterfall(receipt, 100))


def test_a_receipt_with_nothing_in_it_is_drawn_all_the_same() -> None:
    lines = list(map(str, waterfall(Receipt("r", "", "", outcome="invalid_request", error="no").to_wire(), 80, 24)))
    assert lines[0].startswith("r  invalid_request") and "nothing took time" in lines[-1]
