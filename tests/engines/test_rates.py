"""What an engine knows of its own speed: prompts alone and beside streams."""

import pytest

from meshserve.engines.core.rates import StepRates
from meshserve.engines.core.scheduler import StepLimits

UNLIMITED = StepLimits(2**31, 2**31)


def observed(*steps: tuple[int, int, float], limits: StepLimits = UNLIMITED) -> StepRates:
    """Steps of so many prompt tokens and decodes, which took so many seconds."""
    rates = StepRates(limits)
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
