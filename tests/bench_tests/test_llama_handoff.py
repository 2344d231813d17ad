"""What a handoff adds to the time to the first token, and where it goes, from trials as a client and an engine alone report them."""

import pytest

pytest.importorskip("numpy")

from bench.llama.handoff import Trial, summary

BEFORE_MS = {"http": 0.4, "process": 0.3, "route": 0.3, "queue": 2.0, "kv_transfer": 8.0, "network": 1.0, "other": 0.5}
PHASES = {**BEFORE_MS, "prefill": 6030.0, "decode": 60.0}


def test_the_causes_add_up_to_the_time_beyond_the_prefill_alone() -> None:
    trial = Trial(ttft_ms=6044.0, alone_ms=6000.0, phases_ms=PHASES)
    causes = trial.causes_ms
    assert causes["last_token_step"] == 20.0, "three tokens follow the first in 60 ms"
    assert causes["prefill_slower_than_alone"] == 10.0
    assert "decode" not in causes, "what comes after the first token is no part of its time"
    assert sum(causes.values()) == pytest.approx(44.0)


def test_the_figure_is_the_median_of_the_pairs_in_percent() -> None:
    trials = [Trial(alone_ms * (1 + percent / 100), alone_ms, PHASES) for alone_ms, percent in ((6000, 2), (9000, 4), (5000, 3))]
    found = summary(trials)
    assert found["beyond_percent"] == pytest.approx({"median": 3.0, "low": 2.0, "high": 4.0})
    assert (found["pairs"], found["alone_ms"]) == (3, 6000)
