"""The scheduler's rules as tables, in virtual time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshserve.engines.dummy.scheduler import Scheduler, Sequence, Stage, Step
from meshserve.engines.dummy.timing import PROFILES, Timing
from meshserve.errors import PoolFull
from meshserve.kv.pool import BlockPool


def a_scheduler(
    num_blocks: int = 64, max_batch: int = 8, max_batch_tokens: int = 100, timing: Timing = PROFILES["instant"]
) -> Scheduler[Sequence]:
    return Scheduler(BlockPool(num_blocks), timing, block_size=4, max_batch=max_batch, max_batch_tokens=max_batch_tokens)


def hashes(num_tokens: int, prefix: int = 0) -> list[int]:
    return [prefix * 1000 + index for index in range(num_tokens // 4)]


def added(scheduler: Scheduler[Sequence], num_tokens: int, max_new_tokens: int, prefix: int = 0) -> Sequence:
    sequence = Sequence(num_tokens, hashes(num_tokens, prefix), max_new_tokens)
    scheduler.add(sequence, 0.0)
    return sequence


def planned(scheduler: Scheduler[Sequence]) -> Step[Sequence]:
    step = scheduler.plan(0.0)
    assert step is not None
    return step


def shape(step: Step[Sequence]) -> tuple[int, list[int]]:
    return len(step.decodes), [num_tokens for _, num_tokens in step.prefills]


def run_to_end(scheduler: Scheduler[Sequence], produced: dict[int, int]) -> None:
    while (step := scheduler.plan(0.0)) is not None:
        for sequence in scheduler.complete(step, 0.0).producing:
            produced[sequence.arrival] = produced.get(sequence.arrival, 0) + 1


def test_the_step_that_ends_a_prompt_produces_its_first_token() -> None:
    scheduler = a_scheduler()
    sequence = added(scheduler, 10, 2)
    step = planned(scheduler)
    assert (shape(step), step.admitted) == ((0, [10]), [sequence])
    assert scheduler.complete(step, 1.5).producing == [sequence]
    assert (sequence.num_generated, sequence.first_token_at, sequence.stage) == (1, 1.5, Stage.RUNNING)
    step = planned(scheduler)
    assert shape(step) == (1, [])
    assert scheduler.complete(step, 2.0).producing == [sequence]
    assert sequence.stage is Stage.ENDED
    assert scheduler.plan(2.0) is None


def test_a_step_takes_decodes_first_and_then_prompts_in_order_of_arrival() -> None:
    scheduler = a_scheduler(max_batch_tokens=20)
    scheduler_first = added(scheduler, 5, 9, 1)
    scheduler.complete(planned(scheduler), 0.0)
    added(scheduler, 30, 9, 2)
    added(scheduler, 6, 9, 3)
    shapes = []
    for _ in range(3):
        step = planned(scheduler)
        assert step.decodes[0] is scheduler_first
        shapes.append(shape(step))
        scheduler.complete(step, 0.0)
    assert shapes == [(1, [19]), (1, [11, 6]), (3, [])]


def test_a_batch_has_at_most_max_batch_sequences() -> None:
    scheduler = a_scheduler(max_batch=2)
    for prefix in range(3):
        added(scheduler, 4, 2, prefix)
    assert shape(planned(scheduler)) == (0, [4, 4])
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.waiting_prefill_tokens) == (2, 1, 12)


@pytest.mark.parametrize(("num_tokens", "max_new_tokens", "num_computed"), [(12, 1, 4), (13, 1, 1), (11, 1, 3), (12, 0, 0), (15, 0, 3)])
def test_a_cached_prompt_computes_what_is_left_and_a_generation_at_least_its_last_token(
    num_tokens: int, max_new_tokens: int, num_computed: int
) -> None:
    scheduler = a_scheduler()
    added(scheduler, 12, 1)
    scheduler.complete(planned(scheduler), 0.0)
    again = added(scheduler, num_tokens, max_new_tokens)
    step = planned(scheduler)
    assert shape(step) == (0, [num_computed])
    outcome = scheduler.complete(step, 0.0)
    assert (outcome.prefilled, outcome.producing) == (([], [again]) if max_new_tokens else ([again], []))
    assert scheduler.pool.num_used == scheduler.num_running == scheduler.waiting_prefill_tokens == 0


def test_prompt_blocks_stay_cached_and_output_blocks_do_not() -> None:
    scheduler = a_scheduler()
    added(scheduler, 10, 20)
    run_to_end(scheduler, {})
    assert (scheduler.pool.num_used, scheduler.pool.num_idle, scheduler.pool.hashes()) == (0, 2, hashes(10))


def test_what_was_computed_in_one_step_is_found_by_the_next_prompt_while_it_is_still_in_use() -> None:
    scheduler = a_scheduler()
    first = added(scheduler, 9, 5)
    scheduler.complete(planned(scheduler), 0.0)
    second = added(scheduler, 10, 5)
    assert shape(planned(scheduler)) == (1, [2])
    assert second.blocks[:2] == first.blocks[:2]
    assert second.num_cached == 8


def test_the_latest_arrival_gives_way_when_the_pool_is_exhausted_and_comes_back() -> None:
    scheduler = a_scheduler(num_blocks=5)
    first, second = added(scheduler, 8, 8, 1), added(scheduler, 8, 8, 2)
    produced: dict[int, int] = {}
    scheduler.complete(planned(scheduler), 0.0)
    step = planned(scheduler)  # both need a third block, and one is left
    assert (step.decodes, second.stage, second.num_pending) == ([first], Stage.WAITING, 9)
    assert [len(sequence.blocks) for sequence in (first, second)] == [3, 0]
    produced = {1: 1, 2: 1}
    for sequence in scheduler.complete(step, 0.0).producing:
        produced[sequence.arrival] += 1
    run_to_end(scheduler, produced)
    assert produced == {1: 8, 2: 8}


def test_what_could_never_fit_is_refused_at_once() -> None:
    scheduler = a_scheduler(num_blocks=3)
    added(scheduler, 8, 5)
    with pytest.raises(PoolFull, match="13 tokens need 4 KV blocks"):
        added(scheduler, 8, 6)
    assert scheduler.num_waiting == 1


def test_a_head_that_finds_no_room_does_not_hold_up_those_that_bring_their_blocks() -> None:
    scheduler = a_scheduler(num_blocks=4)
    handed_over = Sequence(9, hashes(9, 1), 2)
    blocks = scheduler.pool.allocate(3)
    added(scheduler, 9, 2, 2)
    assert scheduler.plan(0.0) is None
    scheduler.add(handed_over, 0.0, blocks)
    step = planned(scheduler)
    assert step.prefills == [(handed_over, 1)]
    assert scheduler.pool.hashes() == hashes(9, 1)


def test_a_sequence_that_ends_within_a_step_is_passed_over() -> None:
    scheduler = a_scheduler()
    one, other = added(scheduler, 8, 5, 1), added(scheduler, 8, 5, 2)
    step = planned(scheduler)
    scheduler.end(one)
    scheduler.end(one)
    assert scheduler.complete(step, 0.0).producing == [other]
    assert scheduler.pool.hashes() == hashes(8, 2)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 24), st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=8),
    st.integers(9, 14),
    st.integers(1, 30),
    st.integers(1, 5),
)
def test_every_sequence_gets_its_tokens_and_leaves_no_block_behind(
    jobs: list[tuple[int, int, int]], num_blocks: int, max_batch_tokens: int, max_batch: int
) -> None:
    scheduler = a_scheduler(num_blocks, max_batch, max_batch_tokens)
    sequences = [added(scheduler, *job) for job in jobs]
    produced: dict[int, int] = {}
    for _ in range(2000):
        step = scheduler.plan(0.0)
        if step is None:
            break
        assert len(step.decodes) + sum(num_tokens for _, num_tokens in step.prefills) <= max_batch_tokens
        assert scheduler.num_running <= max_batch
        for sequence in scheduler.complete(step, 0.0).producing:
            produced[sequence.arrival] = produced.get(sequence.arrival, 0) + 1
    assert {sequence.stage for sequence in sequences} == {Stage.ENDED}
    assert produced == {sequence.arrival: sequence.max_new_tokens for sequence in sequences if sequence.max_new_tokens}
    assert scheduler.pool.num_used == scheduler.num_waiting == scheduler.waiting_prefill_tokens == 0


@pytest.mark.parametrize(
    ("num_prompt_tokens", "num_decodes", "occupancy", "milliseconds"),
    [
        (0, 0, 0.5, 0.0),
        (1000, 0, 0.0, 16.50142 + 15.18344 + 0.4209989),
        (0, 3, 0.5, 5.74 + 27.005 - 6.435),
        (0, 1, 2.0, 5.74 + 54.01 - 25.74),
        (1, 1, 0.0, 16.50142 + 0.01518344 + 5.74),
    ],
)
def test_the_reference_profile_is_the_one_of_the_traces(
    num_prompt_tokens: int, num_decodes: int, occupancy: float, milliseconds: float
) -> None:
    assert PROFILES["reference"].step_s(num_prompt_tokens, num_decodes, occupancy) * 1000 == pytest.approx(milliseconds, rel=1e-5)


def test_a_step_lasts_as_long_as_its_tokens_and_the_blocks_in_use_say() -> None:
    scheduler = a_scheduler(num_blocks=8, timing=Timing(prefill_ms_per_token=1.0, decode_base_ms=10.0, decode_ms_by_occupancy=100.0))
    added(scheduler, 10, 3, 1)
    step = planned(scheduler)
    assert step.duration_s == pytest.approx(0.010)
    scheduler.complete(step, 0.0)
    added(scheduler, 4, 3, 2)
    assert planned(scheduler).duration_s == pytest.approx(0.004 + 0.010 + 0.1 * 4 / 8)


def test_options_put_milliseconds_on_top_of_a_profile_or_a_rate_in_its_place() -> None:
    assert PROFILES["instant"].with_options(2.5, 1000).step_s(10, 1, 0.3) == pytest.approx(0.0125)
    assert PROFILES["reference"].with_options(0, 0) == PROFILES["reference"]
