"""Sampling from logits at the edges of what requests may ask for: a token, and no warning."""

import warnings

import pytest

pytest.importorskip("numpy")

import numpy

from meshserve.engines.core.sampling import Sampler
from meshserve.wire.generation import Sampling

LOGITS = numpy.array([-800.0, 3.0, 0.0, 799.9, 800.0, -0.0], dtype=numpy.float32)


def sampled(**fields: float) -> list[int]:
    sampling = Sampling(max_tokens=9, seed=1, **fields)  # type: ignore[arg-type]
    sampler = Sampler(sampling, [1, 3], [], [0], None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [sampler.sample(LOGITS, position)[0] for position in range(5)]


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-320, 1e-50, 9e-7])
def test_a_temperature_near_none_is_none(temperature: float) -> None:
    assert sampled(temperature=temperature) == [4] * 5


@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("repetition_penalty", [0.01, 1e6])
def test_the_outermost_values_give_tokens_and_no_warning(temperature: float, repetition_penalty: float) -> None:
    assert len(sampled(temperature=temperature, repetition_penalty=repetition_penalty, logprobs=2)) == 5
