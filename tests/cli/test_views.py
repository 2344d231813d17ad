"""What the terminal views are made of: keys, tables that fit, rates; and log lines that do not storm."""

import json
import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from meshserve.cli.activities import Samples, sparkline
from meshserve.cli.columns import Column, duration, table
from meshserve.cli.peers import gone_lines, refused_lines
from meshserve.cli.running import JsonFormatter, PlainFormatter, RepeatFilter
from meshserve.cli.terminal import parse_keys
from meshserve.telemetry import BUCKETS_S, Counters, Histogram, Histograms, added_up, log_event, printable

COLUMNS = (Column("NAME"), Column("ROLES", 1), Column("LOAD", 2, is_number=True), Column("RTT", 3, is_number=True))


@given(st.lists(st.tuples(*[st.text(max_size=40)] * len(COLUMNS)), max_size=8), st.integers(20, 120))
def test_a_table_never_exceeds_its_width_and_never_steers_the_terminal(rows: list[tuple[str, ...]], width: int) -> None:
    lines = table(COLUMNS, rows, width)
    assert len(lines) == len(rows) + 1
    assert all(line.plain.isprintable() for line in lines)
    narrowest = 20 + sum(cell_len(row[2]) for row in rows)  # numbers are never cut
    assert all(line.cell_len <= max(width, narrowest) for line in lines)


def test_columns_of_the_highest_rank_go_first_and_names_are_cut_last() -> None:
    rows = [("a-rather-long-name", "decode", "12", "0.5 ms")]
    assert [line.plain for line in table(COLUMNS, rows)] == [
        "NAME                ROLES   LOAD     RTT",
        "a-rather-long-name  decode    12  0.5 ms",
    ]
    assert table(COLUMNS, rows, 36)[0].plain == "NAME                ROLES   LOAD"
    assert table(COLUMNS, rows, 28)[0].plain == "NAME                ROLES"
    assert table(COLUMNS, rows, 10)[1].plain == "a-rather-…"
    assert printable("a\x1b[2Jb\n") == "a?[2Jb?"


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"q", ["q"]),
        (b"\x1b[A\x1b[B\x1bOC\x1bOD", ["up", "down", "right", "left"]),
        (b"\r\x7f\x03\x1b", ["enter", "backspace", "ctrl-c", "escape"]),
        (b"\x1b[1;5Aj\x1b[6~", ["j", "page-down"]),
        ("ä€".encode(), ["ä", "€"]),
        (b"\xff\x00", []),
    ],
)
def test_keys_are_told_from_what_a_terminal_sends(data: bytes, keys: list[str]) -> None:
    assert parse_keys(data) == keys


@given(st.binary(max_size=64))
def test_any_bytes_are_some_keys(data: bytes) -> None:
    assert all(key and key.isprintable() for key in parse_keys(data))


@given(st.lists(st.floats(0, 40) | st.sampled_from(BUCKETS_S), max_size=30), st.integers(1, 40), st.integers(0, 3))
def test_durations_are_in_the_bucket_whose_bound_they_do_not_exceed(values: list[float], times: int, looks: int) -> None:
    histograms = Histograms()
    for turn in range(times):
        for value in values:
            for name in ("e2e", "route", "ttft"):
                histograms.named[name].observe(value)
        if turn < looks:
            histograms.snapshot()
    expected = [0] * (len(BUCKETS_S) + 1)
    for value in values:
        expected[sum(bound < value for bound in BUCKETS_S)] += times
    for name in ("e2e", "route", "ttft") if values else ():
        sum_s, counts = histograms.snapshot()[name]
        assert counts == expected and sum_s == pytest.approx(sum(values) * times)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(("note", "count", "fold", "look")), st.floats(0, 40)), max_size=60))
def test_what_is_noted_in_a_part_is_in_the_whole_for_good(steps: list[tuple[str, str, float]]) -> None:
    histograms, told_s = Histograms(), 0.0
    noted: list[float] = []
    for part, step, value in steps:
        if step == "fold":
            histograms.fold(part)
        elif step == "look":
            now_s, counts = histograms.snapshot().get("itl", (0.0, []))
            assert sum(counts) == len(noted) and now_s >= told_s
            told_s = now_s
        elif step == "note":
            histograms.parts[part].named["itl"].observe(value)
            noted.append(value)
        else:
            histograms.parts[part].named["itl"].counts[0] += 1
            noted.append(0.0)
    whole = Histograms()
    for value in noted:
        whole.named["itl"].observe(value)
    found_s, counts = histograms.snapshot().get("itl", [0.0, [0] * (len(BUCKETS_S) + 1)])
    expected_s, expected = whole.snapshot().get("itl", [0.0, [0] * (len(BUCKETS_S) + 1)])
    assert counts == expected and found_s == pytest.approx(expected_s)
    assert not {step[0] for step in steps[-1:] if step[1] == "fold"} & histograms.snapshot_parts().keys()


def test_parts_are_told_apart_until_they_are_folded() -> None:
    histograms = Histograms()
    histograms.named["route"].observe(0.1)
    for worker, value in (("fast", 0.004), ("fast", 0.004), ("slow", 0.2)):
        histograms.parts[worker].named["ttft"].observe(value)
    parts = histograms.snapshot_parts()
    assert {worker: sum(part["ttft"][1]) for worker, part in parts.items()} == {"fast": 2, "slow": 1}
    before = histograms.snapshot()
    assert before == added_up([*parts.values(), {"route": before["route"]}]) and before["ttft"][0] == pytest.approx(0.208)
    histograms.fold("slow")
    histograms.fold("nobody")
    assert histograms.snapshot_parts().keys() == {"fast"} and histograms.snapshot() == before
    histograms.parts["slow"].named["ttft"].observe(0.2)  # it is back, and begins anew
    assert sum(histograms.snapshot_parts()["slow"]["ttft"][1]) == 1 and sum(histograms.snapshot()["ttft"][1]) == 4


@given(st.lists(st.floats(0, 40), min_size=1, max_size=200))
def test_percentiles_lie_in_the_bucket_of_the_true_one(durations_s: list[float]) -> None:
    histograms = Histograms()
    for value in durations_s:
        histograms.named["ttft"].observe(value)
    found_s = Histogram.of_row(histograms.snapshot()["ttft"]).quantile_ms(0.5) / 1000
    median_s = sorted(durations_s)[(len(durations_s) - 1) // 2]
    bounds = [0.0, *BUCKETS_S]
    low_s = max(bound for bound in bounds if bound < median_s or bound == 0.0)
    assert min(low_s, BUCKETS_S[-1]) <= found_s <= next((bound for bound in BUCKETS_S if bound >= median_s), BUCKETS_S[-1])


def test_no_durations_have_no_percentiles() -> None:
    assert math.isnan(Histogram().quantile_ms(0.99))


def a_peer(**counters: int) -> dict[str, object]:
    load = {"num_running": 3, "num_waiting": 1, "num_tickets": 2, "used_blocks": 50, "cached_blocks": 25, "num_blocks": 100}
    return {"incarnation": "x", "name": "x", "rtt_ms": 1.0, "load": load, "counters": counters, "histograms": {}, "latencies": None}


def test_rates_are_of_the_last_seconds_and_shares_of_more() -> None:
    samples = Samples()
    (first,) = samples.add([a_peer(tokens_generated=100, prompt_tokens=1000, prompt_tokens_cached=500)], 10.0)
    assert first.tokens_per_s is None and first.hit_share == 0.5 and (first.used_share, first.cached_share) == (0.5, 0.25)
    (second,) = samples.add([a_peer(tokens_generated=300, prompt_tokens=2000, prompt_tokens_cached=1400)], 12.0)
    assert second.tokens_per_s == 100 and second.prompt_tokens_per_s == 500 and second.hit_share == 0.9
    (idle,) = samples.add([a_peer(tokens_generated=300, prompt_tokens=2000, prompt_tokens_cached=1400)], 14.5)
    assert idle.tokens_per_s == 0 and idle.hit_share == 0.9
    (silent,) = samples.add([{**a_peer(), "rtt_ms": None}], 15.0)
    assert silent.tokens_per_s is None and list(samples.trend) == [0, 100, 0, 0]


def of_durations(**durations_s: float) -> dict[str, object]:
    histograms = Histograms()
    for name, duration_s in durations_s.items():
        histograms.named[name].observe(duration_s)
    return histograms.snapshot()


def test_a_workers_latencies_are_of_what_it_served_and_a_processors_of_all() -> None:
    slow = of_durations(ttft=0.3, itl=0.09)
    worker = {**a_peer(), "latencies": slow}
    both = {**worker, "incarnation": "y", "histograms": of_durations(ttft=0.0004, itl=0.0004)}
    unused = {**both, "incarnation": "z", "latencies": {}}
    processor = {**a_peer(), "incarnation": "p", "load": None, "histograms": added_up([slow, of_durations(ttft=0.3)])}
    found = Samples().add([worker, both, unused, processor], 10.0)
    assert found[0].ttft_ms == found[1].ttft_ms == pytest.approx((375.0, 497.5))
    assert found[0].itl_ms == found[1].itl_ms == pytest.approx((75.0, 99.5))
    assert found[2].ttft_ms is None and found[3].ttft_ms == pytest.approx((375.0, 497.5))


def test_a_worker_whose_processor_left_is_measured_by_what_the_others_say() -> None:
    samples, one = Samples(), of_durations(itl=0.09)
    samples.add([{**a_peer(), "latencies": added_up([one, of_durations(itl=0.004)])}], 10.0)
    (found,) = samples.add([{**a_peer(), "latencies": one}], 11.0)
    assert found.itl_ms == pytest.approx((75.0, 99.5))


def test_a_sparkline_is_as_high_as_its_highest() -> None:
    assert sparkline([0, 5, 10], 10) == "▁▅█" and sparkline([0, 0], 10) == "▁▁" and sparkline([1, 2, 3, 4], 2) == "▇█"
    assert [duration(value) for value in (None, 4.4, 90, 7200, 200_000)] == ["-", "4 s", "2 min", "2 h", "2 d"]


def test_strangers_and_those_who_left_are_merged_over_all_who_saw_them() -> None:
    stranger = {"who": "10.0.0.9", "reason": "it has no key, and this mesh has one", "times": 2}
    gone = {"incarnation": "old", "name": "w", "address": "10.0.0.3:7800"}
    found = [
        {"name": "a", "incarnation": "1", "refused": [{**stranger, "ago_s": 9.0}], "gone": [{**gone, "reason": "left", "ago_s": 5.0}]},
        {
            "name": "b",
            "incarnation": "2",
            "refused": [{**stranger, "ago_s": 3.0}],
            "gone": [{**gone, "reason": "fell silent", "ago_s": 4.0}],
        },
    ]
    assert refused_lines(found) == ["refused  10.0.0.9: it has no key, and this mesh has one (4x by a, b, last 3 s ago)"]
    assert gone_lines(found, []) == ["gone     w at 10.0.0.3:7800: left, 5 s ago"]
    assert gone_lines([{**found[0], "incarnation": "old"}], []) == []  # it is listed above


def test_the_same_line_passes_once_in_ten_seconds_and_a_storm_of_others_is_held_back() -> None:
    limit = RepeatFilter()
    assert [limit.passes("place", "same", now_s) for now_s in (0, 1, 9.9)] == [0, None, None]
    assert limit.passes("place", "same", 10.1) == 2
    limit = RepeatFilter()
    passed = [limit.passes("place", f"peer {number}", number * 0.01) for number in range(100)]
    assert passed[:20] == [0] * 20 and passed[20:] == [None] * 80
    assert limit.passes("elsewhere", "another", 1.0) == 0
    assert limit.passes("place", "later", 20.0) == 80


@given(st.lists(st.tuples(st.text(max_size=3), st.floats(0, 5)), max_size=60))
def test_no_line_is_lost_without_being_counted(lines: list[tuple[str, float]]) -> None:
    limit, now_s, num_seen = RepeatFilter(), 0.0, 0
    for text, pause_s in lines:
        now_s += pause_s
        num_held = limit.passes("place:", text, now_s)
        num_seen += 0 if num_held is None else 1 + num_held
    last = limit.passes("place:", "the end", now_s + 11.0)
    assert last is not None and num_seen + last == len(lines)


def a_record(text: str, **extra: object) -> logging.LogRecord:
    record = logging.LogRecord("meshserve.test", logging.INFO, __file__, 1, "%s", (text,), None)
    record.__dict__.update(extra)
    return record


def test_an_event_in_json_has_its_fields_beside_its_text() -> None:
    line = json.loads(JsonFormatter().format(a_record("w left", event="peer_left", fields={"peer": "w"})))
    assert (line["event"], line["peer"], line["message"], line["level"]) == ("peer_left", "w", "w left", "info")


def test_a_log_line_cannot_steer_the_terminal() -> None:
    assert PlainFormatter("%(levelname)s: %(message)s").format(a_record("a\x1b[2J\nb")) == "INFO: a?[2J?b"


def test_events_are_logged_at_info_only(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("meshserve.test")
    with caplog.at_level(logging.WARNING, "meshserve.test"):
        log_event(logger, "peer_left", "w left")
        assert not caplog.records
    with caplog.at_level(logging.INFO, "meshserve.test"):
        log_event(logger, "peer_left", "w left", peer="w")
        assert caplog.records[0].getMessage() == "w left"


def test_derived_counts_are_asked_for_when_somebody_looks() -> None:
    counters = Counters()
    asked: list[int] = []
    counters.derive("tokens_generated", lambda: len(asked))
    counters.add("other", 2)
    asked.append(1)
    assert counters.snapshot() == {"other": 2, "tokens_generated": 1}
