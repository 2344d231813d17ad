"""What a decode worker knows of its handoffs."""

import pytest

from meshserve.handoff.choice import HandoffRates


def test_a_handoff_is_expected_to_take_nothing_until_measured_and_the_first_one_does_not_count() -> None:
    rates = HandoffRates()
    rates.handed_over(1000, 3.0)
    assert (rates.handoff_s(1000), rates.ns_per_token()) == (0.0, 3_000_000)
    for num_tokens in (100, 1000, 2000):
        rates.handed_over(num_tokens, 0.01 + 0.0001 * num_tokens)
    assert rates.handoff_s(500) == pytest.approx(0.06, rel=0.01)


def test_one_stalled_handoff_counts_as_twice_the_usual_and_fades_while_prompts_stay_here() -> None:
    rates = HandoffRates()
    for _ in range(10):
        rates.handed_over(1000, 0.1)
    rates.handed_over(1000, 60.0)
    stalled_s = rates.handoff_s(1000)
    assert 0.1 < stalled_s < 0.12
    for _ in range(35):
        rates.kept_here()
    assert rates.handoff_s(1000) == pytest.approx(stalled_s / 2, rel=0.05)
    rates.handed_over(1000, 0.1)
    assert rates.handoff_s(1000) > 0.09
