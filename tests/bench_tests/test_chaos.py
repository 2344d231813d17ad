"""The plan of `bench.chaos`: what it disturbs, and what it leaves alone."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from bench.fault_plan import DEATH_S, FAILURE_TIMEOUT_S, KINDS, PERIOD_S, Fault, plan


def test_in_ten_minutes_each_kind_comes_thirty_times_and_long_ones_are_as_many_as_they_should_be() -> None:
    faults = plan(1, 600.0)
    assert len(faults) == round(600.0 / PERIOD_S) - 1
    assert all(count >= 30 for count in Counter(fault.kind for fault in faults).values()) and {fault.kind for fault in faults} == set(KINDS)
    timed = [fault.lasts_s for fault in faults if fault.kind in ("stop", "link_down")]
    assert 0.4 <= sum(lasts_s > FAILURE_TIMEOUT_S for lasts_s in timed) / len(timed) <= 0.65
    assert 0.1 <= sum(lasts_s > DEATH_S for lasts_s in timed) / len(timed) <= 0.35


@given(st.integers(0, 10_000))
def test_a_seed_repeats_its_faults_and_no_target_has_two_at_once(seed: int) -> None:
    faults = plan(seed, 120.0)
    assert faults == plan(seed, 120.0)
    last: dict[str, Fault] = {}
    for fault in faults:
        before = last.get(fault.target)
        assert before is None or before.at_s + before.lasts_s < fault.at_s
        last[fault.target] = fault
