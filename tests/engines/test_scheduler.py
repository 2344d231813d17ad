"""The scheduler's rules as tables, in virtual time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshserve.engines.core.scheduler import Outcome, Scheduler, Sequence, Stage, Step, StepLimits
from meshserve.errors import PoolFull
from meshserve.kv.pool import BlockPool


def a_scheduler(num_blocks: int = 64, max_batch: int = 8, max_batch_tokens: int = 100) -> Scheduler[Sequence]:
    return Scheduler(BlockPool(num_blocks), 4, StepLimits(max_batch, max_batch_tokens))


def updated(scheduler: Scheduler[Sequence], step: Step[Sequence], now: float) -> Outcome[Sequence]:
    return scheduler.update(step, [0] * (len(step.decodes) + len(step.prefills)), now)


def hashes(num_tokens: int, prefix: int = 0) -> list[int]:
    return [prefix * 1000 + index for index in range(num_tokens // 4)]


def added(scheduler: Scheduler[Sequence], num_tokens: int, max_new_tokens: int, prefix: int = 0) -> Sequence:
    sequence = Sequence(num_tokens, hashes(num_tokens, prefix), max_new_tokens)
    scheduler.add(sequence, 0.0)
    return sequence


def planned(scheduler: Scheduler[Sequence]) -> Step[Sequence]:
    step = scheduler.schedule(0.0)
    assert step is not None
    return step


def shape(step: Step[Sequence]) -> tuple[int, list[int]]:
    return len(step.decodes), [num_tokens for _, num_tokens in step.prefills]


def run_to_end(scheduler: Scheduler[Sequence], produced: dict[int, int]) -> None:
    while (step := scheduler.schedule(0.0)) is not None:
        for sequence in updated(scheduler, step, 0.0).producing:
            produced[sequence.arrival] = produced.get(sequence.arrival, 0) + 1


def test_the_step_that_ends_a_prompt_produces_its_first_token() -> None:
    scheduler = a_scheduler()
    sequence = added(scheduler, 10, 2)
    step = planned(scheduler)
    assert (shape(step), step.admitted) == ((0, [10]), [sequence])
    assert updated(scheduler, step, 1.5).producing == [sequence]
    assert (sequence.num_generated, sequence.first_token_at, sequence.stage) == (1, 1.5, Stage.RUNNING)
    step = planned(scheduler)
    assert shape(step) == (1, [])
    assert updated(scheduler, step, 2.0).producing == [sequence]
    assert sequence.stage is Stage.ENDED
    assert scheduler.schedule(2.0) is None


def test_a_step_takes_decodes_first_and_then_prompts_in_order_of_arrival() -> None:
    scheduler = a_scheduler(max_batch_tokens=20)
    scheduler_first = added(scheduler, 5, 9, 1)
    updated(scheduler, planned(scheduler), 0.0)
    added(scheduler, 30, 9, 2)
    added(scheduler, 6, 9, 3)
    shapes = []
    for _ in range(3):
        step = planned(scheduler)
        assert step.decodes[0] is scheduler_first
        shapes.append(shape(step))
        updated(scheduler, step, 0.0)
    assert shapes == [(1, [19]), (1, [11, 6]), (3, [])]


def test_a_batch_has_at_most_max_batch_sequences() -> None:
    scheduler = a_scheduler(max_batch=2)
    for prefix in range(3):
        added(scheduler, 4, 2, prefix)
    assert shape(planned(scheduler)) == (0, [4, 4])
    assert (len(scheduler.running), scheduler.num_unfinished, scheduler.waiting_prefill_tokens) == (2, 3, 12)


@pytest.mark.parametrize(("num_tokens", "max_new_tokens", "num_computed"), [(12, 1, 4), (13, 1, 1), (11, 1, 3), (12, 0, 0), (15, 0, 3)])
def test_a_cached_prompt_computes_what_is_left_and_a_generation_at_least_its_last_token(
    num_tokens: int, max_new_tokens: int, num_computed: int
) -> None:
    scheduler = a_scheduler()
    added(scheduler, 12, 1)
    updated(scheduler, planned(scheduler), 0.0)
    again = added(scheduler, num_tokens, max_new_tokens)
    step = planned(scheduler)
    assert shape(step) == (0, [num_computed])
    outcome = updated(scheduler, step, 0.0)
    assert (outcome.prefilled, outcome.producing) == (([], [again]) if max_new_tokens else ([again], []))
    assert scheduler.pool.num_used == scheduler.num_unfinished == scheduler.waiting_prefill_tokens == 0


def test_prompt_blocks_stay_cached_and_output_blocks_do_not() -> None:
    scheduler = a_scheduler()
    added(scheduler, 10, 20)
    run_to_end(scheduler, {})
    assert (scheduler.pool.num_used, len(scheduler.pool.idle), scheduler.pool.hashes()) == (0, 2, hashes(10))


def test_what_was_computed_in_one_step_is_found_by_the_next_prompt_while_it_is_still_in_use() -> None:
    scheduler = a_scheduler()
    first = added(scheduler, 9, 5)
    updated(scheduler, planned(scheduler), 0.0)
    second = added(scheduler, 10, 5)
    assert shape(planned(scheduler)) == (1, [2])
    assert second.blocks[:2] == first.blocks[:2]
    assert second.num_cached == 8


def test_the_latest_arrival_gives_way_when_the_pool_is_exhausted_and_comes_back() -> None:
    scheduler = a_scheduler(num_blocks=5)
    first, second = added(scheduler, 8, 8, 1), added(scheduler, 8, 8, 2)
    produced: dict[int, int] = {}
    updated(scheduler, planned(scheduler), 0.0)
    step = planned(scheduler)  # both need a third block, and one is left
    assert (step.decodes, second.stage, second.num_pending) == ([first], Stage.WAITING, 9)
    assert [len(sequence.blocks) for sequence in (first, second)] == [3, 0]
    produced = {1: 1, 2: 1}
    for sequence in updated(scheduler, step, 0.0).producing:
        produced[sequence.arrival] += 1
    run_to_end(scheduler, produced)
    assert produced == {1: 8, 2: 8}


def test_what_could_never_fit_is_refused_at_once() -> None:
    scheduler = a_scheduler(num_blocks=3)
    added(scheduler, 8, 5)
    with pytest.raises(PoolFull, match="13 tokens need 4 KV blocks"):
        added(scheduler, 8, 6)
    assert scheduler.num_unfinished - len(scheduler.running) == 1


def test_a_head_that_finds_no_room_does_not_hold_up_those_that_bring_their_blocks() -> None:
    scheduler = a_scheduler(num_blocks=4)
    handed_over = Sequence(9, hashes(9, 1), 2)
    blocks = scheduler.pool.allocate(3)
    added(scheduler, 9, 2, 2)
    assert scheduler.schedule(0.0) is None
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
    assert updated(scheduler, step, 0.0).producing == [other]
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
        step = scheduler.schedule(0.0)
        if step is None:
            break
        assert len(step.decodes) + sum(num_tokens for _, num_tokens in step.prefills) <= max_batch_tokens
        assert len(scheduler.running) <= max_batch
        for sequence in updated(scheduler, step, 0.0).producing:
            produced[sequence.arrival] = produced.get(sequence.arrival, 0) + 1
    assert {sequence.stage for sequence in sequences} == {Stage.ENDED}
    assert produced == {sequence.arrival: sequence.max_new_tokens for sequence in sequences if sequence.max_new_tokens}
    assert scheduler.pool.num_used == scheduler.num_unfinished == scheduler.waiting_prefill_tokens == 0


def test_a_step_counts_its_prompt_tokens_and_the_blocks_in_use() -> None:
    scheduler = a_scheduler(num_blocks=8)
    added(scheduler, 10, 3, 1)
    step = planned(scheduler)
    assert (step.num_prompt_tokens, step.used_blocks) == (10, 3)
    updated(scheduler, step, 0.0)
    added(scheduler, 4, 3, 2)
    step = planned(scheduler)
    assert (step.num_prompt_tokens, step.used_blocks) == (4, 4)


def chunks_of(num_tokens: int, max_new_tokens: int, num_decodes: int = 0) -> list[int]:
    limits = StepLimits(max_running=8, max_step_tokens=24, max_prompt_tokens=16, max_mixed_tokens=6, chunk_tokens=8)
    scheduler: Scheduler[Sequence] = Scheduler(BlockPool(64), 4, limits)
    for prefix in range(1, num_decodes + 1):
        added(scheduler, 1, 50, prefix)
        updated(scheduler, planned(scheduler), 0.0)
    sequence, chunks = added(scheduler, num_tokens, max_new_tokens), []
    while sequence.stage is not Stage.ENDED:
        step = planned(scheduler)
        chunks += [taken for found, taken in step.prefills if found is sequence]
        updated(scheduler, step, 0.0)
    return chunks


def test_a_prompt_is_cut_at_multiples_of_the_chunk_and_its_last_token_is_a_step_of_its_own() -> None:
    assert chunks_of(45, 1) == [16, 16, 12, 1]
    assert chunks_of(1, 1) == [1]
    assert chunks_of(17, 1) == [16, 1]


def test_a_prompt_that_another_worker_continues_is_cut_at_the_same_places() -> None:
    assert chunks_of(44, 0) == [16, 16, 12]


def test_beside_running_sequences_a_prompt_takes_few_tokens_of_each_step() -> None:
    assert chunks_of(15, 1, num_decodes=1) == [6, 6, 2, 1]


def test_what_a_sequence_is_called_with_comes_back_with_it() -> None:
    scheduler = a_scheduler()
    added(scheduler, 4, 3, 1)
    updated(scheduler, planned(scheduler), 0.0)
    added(scheduler, 4, 3, 2)
    ended = added(scheduler, 4, 3, 3)
    step = planned(scheduler)
    scheduler.end(ended)
    outcome = scheduler.update(step, [11, 12, 13], 0.0)
    assert outcome.tokens == [11, 12]
