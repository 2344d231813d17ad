"""What the load generator decides and counts: tables and laws, without a socket."""

import itertools
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.cli.bench.arrivals import Level, due_times, parse_ramp
from meshserve.cli.bench.compare import compare_runs, interval_rank, left_out, ratio_of
from meshserve.cli.bench.prompts import PROBE_CHARS, Scale, Shape, Texts, Workload, parse_lengths
from meshserve.cli.bench.requests import Ending, Request, RequestRecord
from meshserve.cli.bench.selfcheck import findings
from meshserve.cli.bench.sweep import find_knee, parse_sweep
from meshserve.cli.bench.tally import Goal, Tally, fine_histogram
from meshserve.errors import UsageError

# --- histograms


@given(st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99, 0.999, 1.0]))
def test_a_quantile_is_within_a_thousandth_of_the_exact_one(seconds: list[float], share: float) -> None:
    exact = sorted(seconds)[math.ceil(share * len(seconds) - 1e-9) - 1]
    found = fine_histogram(seconds).quantile_ms(share) / 1000
    assert exact * (1 - 1e-3) - 1e-9 <= found <= exact * (1 + 1e-3) + 1e-9


@given(st.lists(st.floats(0, 100), max_size=50), st.lists(st.floats(0, 100), max_size=50))
def test_histograms_add_up_to_that_of_all_values(one: list[float], other: list[float]) -> None:
    added = fine_histogram(one)
    added.add(fine_histogram(other))
    assert added.to_dict() == pytest.approx(fine_histogram(one + other).to_dict())
    assert [share for _, share in added.steps()] == sorted(share for _, share in added.steps())


def test_a_histogram_of_nothing_has_no_figures() -> None:
    empty = fine_histogram()
    assert math.isnan(empty.quantile_ms(0.5)) and math.isnan(empty.mean_ms) and empty.to_dict() == {"count": 0}
    assert fine_histogram([-0.5]).to_dict()["max"] == 0


# --- lengths and arrivals


@pytest.mark.parametrize(
    ("words", "low", "high", "mean"),
    [
        ("512", 512, 512, 512),
        ("uniform:100:200", 100, 200, 150),
        ("normal:512:64", 200, 900, 512),
        ("lognormal:512:0.5", 1, 20_000, 512 * math.exp(0.125)),
        ("normal:1:100", 1, 600, None),
    ],
)
def test_lengths_are_drawn_as_asked_for(words: str, low: int, high: int, mean: float | None) -> None:
    rng = random.Random(1)
    drawn = [parse_lengths(words)(rng) for _ in range(4000)]
    assert low <= min(drawn) and max(drawn) <= high
    if mean is not None:
        assert abs(sum(drawn) / len(drawn) - mean) <= mean * 0.05


@pytest.mark.parametrize("words", ["", "0", "-5", "many", "normal:5", "uniform:9:3", "lognormal:0:1", "512:3", "normal:nan:1", "2e9"])
def test_what_is_no_distribution_is_refused(words: str) -> None:
    with pytest.raises(UsageError, match="distribution of lengths"):
        parse_lengths(words)


@given(st.floats(0, 1000), st.floats(0.1, 1000), st.floats(0, 100), st.floats(0, 10_000))
def test_a_ramp_brings_as_many_arrivals_as_its_rate_adds_up_to(first: float, last: float, ramp_s: float, count: float) -> None:
    level = Level(first, last, ramp_s)
    seconds = level.time_of(count)
    ramped_s = min(seconds, ramp_s)
    brought = (first + level.at(ramped_s if ramped_s < ramp_s else ramp_s - 0.0)) / 2 * ramped_s + max(0.0, seconds - ramp_s) * last
    assert brought == pytest.approx(count, rel=1e-6, abs=1e-6)


def test_constant_arrivals_are_even_and_poisson_ones_have_the_variance_of_their_mean() -> None:
    level = Level(50, 50)
    even = list(itertools.islice(due_times(level, "constant", random.Random(0)), 5))
    assert even == pytest.approx([0, 0.02, 0.04, 0.06, 0.08])
    times = list(itertools.takewhile(lambda due: due < 400, due_times(level, "poisson", random.Random(3))))
    counts = [0] * 400
    for due in times:
        counts[int(due)] += 1
    mean = sum(counts) / 400
    variance = sum((count - mean) ** 2 for count in counts) / 400
    assert abs(mean - 50) < 1.5 and 0.8 < variance / mean < 1.2


@pytest.mark.parametrize("words", ["rate=1:2", "speed=1:2:3", "rate=1:0:3", "rate=a:b:c", "rate=-1:2:3", "rate=1:2:0", "rate=1:nan:3"])
def test_what_is_no_ramp_is_refused(words: str) -> None:
    with pytest.raises(UsageError, match="--ramp"):
        parse_ramp(words)


# --- prompts


TEXTS = Texts(1)


@given(st.text("abc123", min_size=1, max_size=8), st.integers(1, 5000))
def test_a_text_has_exactly_the_length_that_was_asked_for(label: str, size: int) -> None:
    assert len(TEXTS.make(label, size)) == size


def test_texts_are_the_same_for_the_same_seed_and_label() -> None:
    assert TEXTS.make("a", 400_000) == Texts(1).make("a", 400_000) != Texts(2).make("a", 400_000)
    assert TEXTS.make("b", 300) != TEXTS.make("a", 300)


def test_how_long_tokens_are_comes_from_two_probes() -> None:
    short, long = PROBE_CHARS
    scale = Scale.from_probes(short // 4 + 10, long // 4 + 10)
    assert scale is not None and scale.num_chars(110) == 400 and scale.num_chars(100, is_first=False) == 400
    assert Scale.from_probes(5, 5) is None


def test_prompts_share_their_prefix_and_nothing_else() -> None:
    shape = Shape(parse_lengths("64"), parse_lengths("8"), num_shared_tokens=32, num_prefixes=3)
    prompts = [job.prompt for job in itertools.islice(Workload(shape, Scale(1.0), 5), 40)]
    assert all(len(prompt) == 96 for prompt in prompts)
    assert len({prompt[:32] for prompt in prompts}) == 3 and len({prompt[32:44] for prompt in prompts}) == 40


def test_a_conversation_carries_all_that_was_said() -> None:
    shape = Shape(parse_lengths("10"), parse_lengths("8"), num_turns=3)
    workload = Workload(shape, Scale(1.0), 5)
    first = next(iter(workload))
    second = workload.next_turn(first, "an answer")
    assert second is not None and second.messages[:2] == (*first.messages, ("assistant", "an answer"))
    third = workload.next_turn(second, "more")
    assert third is not None and len(third.messages) == 5 and workload.next_turn(third, "") is None


# --- figures


def record(
    due_s: float, times_s: Sequence[float], error: str | None = None, is_measured: bool = True, ended_s: float | None = None
) -> RequestRecord:
    made = RequestRecord(Request((("user", "x"),), 4), due_s, lambda _: None, is_measured)
    made.sent(due_s + 0.001)
    for time_s in times_s:
        made.content(time_s, 1)
    end_s = times_s[-1] if times_s else due_s
    if error is None:
        made.finish(end_s, Ending(num_completion_tokens=len(times_s)))
    else:
        made.fail(end_s, error)
    return made


def tally_of(records: Sequence[RequestRecord], goal: Goal | None = None, duration_s: float | None = 10.0) -> Tally:
    tally = Tally(goal or Goal())
    tally.open_window(0.0, duration_s)
    for one in records:
        tally.ended(one)
    return tally


def test_gaps_are_counted_one_by_one_and_latency_from_when_a_request_was_due() -> None:
    tally = tally_of([record(1.0, [1.5, 1.6, 2.6])])
    assert tally.times["ttft"].to_dict()["max"] == 500 and tally.times["e2e"].to_dict()["max"] == 1600
    assert tally.times["itl"].count == 2 and tally.times["itl"].to_dict()["max"] == 1000
    assert tally.times["tpot"].to_dict()["max"] == 550 and tally.times["queue"].to_dict()["max"] == 1


def test_rates_are_those_of_the_window_whoever_was_asked_before_it() -> None:
    before = record(-1.0, [-0.5, 0.5], is_measured=False)
    within = record(1.0, [2.0, 3.0])
    after = record(9.0, [9.5, 11.0])
    tally = tally_of([before, within, after])
    assert tally.requests_per_s == pytest.approx(0.2) and tally.tokens_per_s == pytest.approx(0.4)
    assert tally.num_done == 2 and tally.times["e2e"].count == 2


def test_without_a_duration_the_window_ends_with_the_last_answer() -> None:
    tally = tally_of([record(0.0, [0.5, 1.0]), record(1.0, [2.0, 4.0])], duration_s=None)
    assert (tally.window_s, tally.requests_per_s, tally.tokens_per_s) == (4.0, 0.5, 1.0)


def test_errors_are_counted_by_kind_and_an_answer_without_content_is_one() -> None:
    tally = tally_of([record(0.0, [], error="timeout"), record(0.0, [], error="timeout"), record(0.0, [])])
    assert tally.errors == {"timeout": 2, "empty answer": 1} and tally.times["ttft"].count == 0


@pytest.mark.parametrize(
    ("goal", "is_met"),
    [
        (Goal(), True),
        (Goal(ttft_s=0.5), True),
        (Goal(ttft_s=0.49), False),
        (Goal(itl_s=0.11), True),
        (Goal(itl_s=0.09), False),
        (Goal(ttft_s=0.5, itl_s=0.05), False),
    ],
)
def test_goodput_counts_requests_that_met_their_targets(goal: Goal, is_met: bool) -> None:
    tally = tally_of([record(1.0, [1.5, 1.6, 1.7])], goal)
    assert tally.num_good == is_met and tally.goodput == pytest.approx(0.1 * is_met)


def test_a_request_ends_once() -> None:
    ended: list[RequestRecord] = []
    one = RequestRecord(Request((("user", "x"),), 4), 0.0, ended.append)
    one.fail(1.0, "timeout")
    one.finish(2.0, Ending())
    assert len(ended) == 1 and one.error == "timeout" and one.ended_s == 1.0


# --- comparing, sweeping, looking at oneself


def turn(latency_s: float) -> Tally:
    return tally_of([record(float(number), [number + latency_s, number + 2 * latency_s]) for number in range(8)])


def test_two_that_differ_are_told_apart_and_two_that_do_not_are_not() -> None:
    rng = random.Random(2)
    noise = [1 + rng.uniform(-0.05, 0.05) for _ in range(20)]
    slower = {one.name: one for one in compare_runs([(turn(0.1 * a), turn(0.12 * b)) for a, b in itertools.pairwise(noise)])}
    assert slower["TTFT p50"].verdict == "B is higher" and slower["TTFT p50"].ratio.low > 1.1
    same = {one.name: one for one in compare_runs([(turn(0.1 * a), turn(0.1 * b)) for a, b in itertools.pairwise(noise)])}
    assert same["TTFT p50"].verdict == "cannot be told apart" and same["requests/s"].verdict == "cannot be told apart"


def test_a_figure_that_too_few_pairs_have_is_left_out() -> None:
    assert compare_runs([(turn(0.1), turn(0.1))] * 5) == []
    assert not any(one.name == "goodput/s" for one in compare_runs([(turn(0.1), turn(0.1))] * 8))


def test_a_side_that_answers_too_little_to_be_compared_is_named() -> None:
    nothing = tally_of([record(0.0, [], error="HTTP 503")])
    assert left_out([(turn(0.1), turn(0.1))] * 6) == []
    (said,) = left_out([(turn(0.1), nothing)] * 6)
    assert (
        said.startswith("not compared, as A has it in 6 turns and B in 0: requests/s, output tokens/s, TTFT p50") and "goodput" not in said
    )


@pytest.mark.parametrize(("count", "rank"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (10, 1), (20, 5), (30, 9), (100, 39), (2000, 955)])
def test_the_interval_is_that_of_the_binomial_tables(count: int, rank: int) -> None:
    assert interval_rank(count) == rank


@given(st.integers(0, 2**32))
def test_the_interval_holds_the_true_ratio_nearly_always(seed: int) -> None:
    rng = random.Random(seed)
    misses = 0
    for _ in range(40):
        ratio = ratio_of([1.5 * rng.lognormvariate(0, 0.2) for _ in range(20)], [rng.lognormvariate(0, 0.2) for _ in range(20)])
        misses += not ratio.low <= 1.5 <= ratio.high
    assert misses <= 12  # 2 expected; more than this once in a billion


def step(rate: int, latency_s: float, goal: Goal | None = None) -> Tally:
    return tally_of([record(number / rate, [number / rate + latency_s]) for number in range(rate)], goal, 1.0 + latency_s)


def test_the_knee_is_the_step_of_greatest_power() -> None:
    steps = [step(10, 0.1), step(20, 0.1), step(40, 0.12), step(44, 0.5)]
    knee = find_knee(steps)
    assert (knee.index, knee.is_inside, knee.good_index) == (2, True, None)
    assert not find_knee(steps[:3]).is_inside
    goal = Goal(ttft_s=0.11)
    assert find_knee([step(10, 0.1, goal), step(20, 0.1, goal), step(40, 0.12, goal)]).good_index == 1


@pytest.mark.parametrize(
    "words", ["concurrency=4", "concurrency=4,2", "concurrency=1,2.5", "rate=0,1", "colour=1,2", "rate=1,x", "rate=1,inf"]
)
def test_what_is_no_sweep_is_refused(words: str) -> None:
    with pytest.raises(UsageError, match="--sweep"):
        parse_sweep(words)


@pytest.mark.parametrize(
    ("cpu_share", "late_s", "lag_s", "words"),
    [
        (0.95, 0.0, 0.0, "bottleneck: it took 95%"),
        (0.2, 0.05, 0.0, "sent late"),
        (0.2, 0.0, 0.05, "event loop hung"),
        (0.2, 0.0005, 0.002, ""),
    ],
)
def test_the_generator_says_when_it_was_what_was_measured(cpu_share: float, late_s: float, lag_s: float, words: str) -> None:
    tally = tally_of([record(0.0, [0.01, 0.02])])
    found = findings(cpu_share, fine_histogram([late_s] * 100), fine_histogram([lag_s] * 100), tally)
    assert (words in found[0]) if words else not found


def test_what_was_delayed_unsent_or_failed_is_said() -> None:
    tally = tally_of([record(0.0, [], error="HTTP 503 overloaded")])
    tally.num_delayed, tally.num_unsent = 3, 4
    said = " ".join(findings(0.1, fine_histogram(), fine_histogram(), tally))
    assert "3 requests waited" in said and "4 requests were due and never sent" in said and "1 HTTP 503 overloaded" in said
