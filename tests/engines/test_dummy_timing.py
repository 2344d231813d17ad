"""The dummy engine's timing, as tables, and as what a virtual engine makes of it."""

import pytest

from bench.virtual_engine import SimulatedEngine
from meshserve.engines.core.scheduler import Sequence
from meshserve.engines.dummy.options import PROFILES, Timing


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
    timing = Timing(prefill_ms_per_token=1.0, decode_base_ms=10.0, decode_ms_by_occupancy=100.0)
    engine: SimulatedEngine[Sequence] = SimulatedEngine("w", 8, 4, timing, max_batch=8, max_batch_tokens=100)
    engine.add(Sequence(10, [1, 2], 3), "one", 0.0)
    step = engine.begin(0.0)
    assert step is not None and engine.duration_s(step) == pytest.approx(0.010)
    engine.end(step, 0.0)
    engine.add(Sequence(4, [3], 3), "two", 0.0)
    step = engine.begin(0.0)
    assert step is not None and engine.duration_s(step) == pytest.approx(0.004 + 0.010 + 0.1 * 4 / 8)


def test_options_put_milliseconds_on_top_of_a_profile_or_a_rate_in_its_place() -> None:
    assert PROFILES["instant"].with_options(2.5, 1000).step_s(10, 1, 0.3) == pytest.approx(0.0125)
    assert PROFILES["reference"].with_options(0, 0) == PROFILES["reference"]
