"""What an engine knows of its own speed: prompts alone and beside streams, and what a handoff takes."""

import pytest

from meshserve.engines.core.rates import StepRates
from meshserve.engines.core.scheduler import StepLimits


def observed(*steps: tuple[int, int, float], limits: StepLimits | None = None) -> StepRates:
    """Steps of so many prompt tokens and decodes, which took so many seconds."""
    rates = StepRates(limits) if limits else StepRates()
    for num_prompt_tokens, num_decodes, duration_s in steps:
        rates.observe(num_prompt_tokens, num_decodes, 10, duration_s)
    return rates


def test_nothing_is_said_of_prompts_until_some_steps_had_one() -> None:
    assert observed(*[(100, 0, 0.1)] * 2).prefill_s(100, 0) is None
    assert observed(*[(100, 0, 0.1)] * 4).prefill_s(50, 0) == pytest.approx(0.05)


def test_the_last_tokens_of_prompts_from_elsewhere_say_nothing_of_prompts() -> None:
    assert observed(*[(1, 4, 0.02)] * 50).prefill_s(100, 4) is None


def test_a_prompt_alone_and_one_beside_streams_have_rates_of_their_own() -> None:
    alone, beside = (64, 0, 0.4), (16, 4, 0.2)
    rates = observed(*[alone, beside] * 5, limits=StepLimits(64, 128, 64, 16))
    assert rates.prefill_s(640, 0) == pytest.approx(4.0)
    assert rates.prefill_s(640, 4) == pytest.approx(8.0)


def test_each_step_of_a_prompt_has_the_base_time() -> None:
    limits = StepLimits(8, 200)
    rates = observed(*[(tokens, 0, 0.01 + 0.001 * tokens) for tokens in (50, 100, 150, 200)], limits=limits)
    assert rates.prefill_s(400, 0) == pytest.approx(2 * 0.01 + 0.4)


def test_beside_streams_a_prompt_takes_their_steps_besides_until_that_was_measured() -> None:
    prompts = [(tokens, 0, 0.001 * tokens) for tokens in (50, 100, 150, 200)]
    rates = observed(*prompts, *[(0, 2, 0.03)] * 4, limits=StepLimits(8, 1000, 0, 10))
    assert rates.decode_s() == pytest.approx(0.03)
    assert rates.prefill_s(100, 2) == pytest.approx(0.1 + 10 * 0.03)


def test_a_handoff_is_expected_to_take_nothing_until_measured_and_the_first_one_does_not_count() -> None:
    rates = StepRates()
    rates.handed_over(1000, 3.0)
    assert rates.handoff_s(1000) == 0.0
    for num_tokens in (100, 1000, 2000):
        rates.handed_over(num_tokens, 0.01 + 0.0001 * num_tokens)
    assert rates.handoff_s(500) == pytest.approx(0.06, rel=0.01)


def test_one_stalled_handoff_counts_as_twice_the_usual_and_fades_while_prompts_stay_here() -> None:
    rates = StepRates()
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
