"""Workers that join, that were slow at first, and that are slow: who is asked how often, one request at a time."""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshserve.engines.core.rates import StepRates
from meshserve.engines.core.scheduler import StepLimits
from meshserve.routing.fleet import Fleet, Question
from meshserve.routing.policies import POLICIES
from meshserve.routing.workers import Prompt
from meshserve.wire.routing import WorkerLoad, WorkerReport

NUM_BLOCKS, BLOCK_SIZE, OUTPUT_TOKENS = 4096, 16, 20
PREFILL_S, PREFILL_S_PER_TOKEN, STEP_S = 0.002, 0.00002, 0.004


@dataclass
class Worker:
    """Takes `slower` times as long as the others, and the first so many prompts `cold` times as long."""

    name: str
    slower: float = 1.0
    cold: float = 1.0
    num_cold: int = 0
    num_served: int = 0
    rates: StepRates = field(default_factory=lambda: StepRates(StepLimits(256, 8192)))

    def serve(self, num_tokens: int, noise: random.Random, now_s: float) -> float:
        """One request alone. When it is over."""
        factor = self.slower * (self.cold if self.num_served < self.num_cold else 1.0)
        self.num_served += 1
        prefill_s = (PREFILL_S + PREFILL_S_PER_TOKEN * num_tokens) * factor * noise.uniform(0.9, 1.2)
        now_s += prefill_s
        self.rates.observe(num_tokens, 0, 0, prefill_s, now_s)
        for _ in range(OUTPUT_TOKENS - 1):
            step_s = STEP_S * factor * noise.uniform(0.9, 1.2)
            now_s += step_s
            self.rates.observe(0, 1, num_tokens // BLOCK_SIZE + 1, step_s, now_s)
        self.rates.finished(OUTPUT_TOKENS)
        return now_s

    def report(self) -> WorkerReport:
        return WorkerReport(WorkerLoad(num_blocks=NUM_BLOCKS, **self.rates.figures()), admitted=("r",))


@dataclass
class House:
    """A router and its workers, of which one is asked at a time."""

    workers: dict[str, Worker] = field(default_factory=dict)
    fleet: Fleet = field(default_factory=lambda: Fleet(rng=random.Random(1)))
    noise: random.Random = field(default_factory=lambda: random.Random(2))
    now_s: float = 0.0

    def join(self, worker: Worker, kind: str = "") -> None:
        self.workers[worker.name] = worker
        self.fleet.join(worker.name, worker.name, kind)
        self.fleet.report(worker.name, worker.report(), self.now_s)

    def ask(self, count: int, policy: str = "kv", *names: str) -> Counter[str]:
        """So many requests, one after the other. Who got how many."""
        shares: Counter[str] = Counter()
        for _ in range(count):
            num_tokens = self.noise.randrange(20, 2000)
            question = Question("r", Prompt(num_tokens, BLOCK_SIZE), names or list(self.workers))
            chosen = self.fleet.choose(policy, question, self.now_s).decode[0].incarnation
            shares[chosen] += 1
            self.now_s = self.workers[chosen].serve(num_tokens, self.noise, self.now_s) + 0.02
            self.fleet.report(chosen, self.workers[chosen].report(), self.now_s)
        return shares


def house(*workers: Worker) -> House:
    made = House()
    for worker in workers:
        made.join(worker)
    return made


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("speed", [0.2, 1.0, 5.0])
def test_a_worker_that_joins_gets_its_share_of_one_request_at_a_time(policy: str, speed: float) -> None:
    found = house(Worker("w0", speed), Worker("w1", speed))
    found.ask(200, policy)
    found.join(Worker("w2", speed))
    assert found.ask(600, policy)["w2"] > 0.8 * 200


@settings(max_examples=12, deadline=None)
@given(st.floats(0.02, 50), st.floats(1, 6), st.integers(0, 4), st.integers(1, 100))
def test_it_does_so_however_fast_the_others_are_and_however_slow_its_first_prompts(
    speed: float, cold: float, num_cold: int, num_before: int
) -> None:
    found = house(Worker("w0", speed, cold, num_cold), Worker("w1", speed, cold, num_cold))
    found.ask(num_before)
    found.join(Worker("w2", speed, cold, num_cold))
    found.ask(150)
    assert found.ask(600)["w2"] > 0.8 * 200


def test_a_worker_that_is_slower_is_asked_now_and_then_and_as_often_as_the_others_once_it_is_no_more() -> None:
    slow = Worker("w2", 3.0)
    found = house(Worker("w0"), Worker("w1"), slow)
    found.ask(1000)
    assert 1 <= found.ask(2000)["w2"] <= 30
    slow.slower = 1.0
    found.ask(4000)
    assert found.ask(600)["w2"] > 0.8 * 200


def test_among_slow_ones_a_worker_that_joins_shows_that_it_is_fast() -> None:
    found = house(Worker("w0"), Worker("w1", 4.0), Worker("w2", 4.0))
    found.ask(400)
    found.join(Worker("w3"))
    assert found.ask(600)["w3"] > 0.8 * 300


def test_figures_of_one_engine_and_model_say_nothing_of_another() -> None:
    found = House()
    found.join(Worker("a0"), "a")
    found.join(Worker("b0", 20.0), "b")
    for name in ("a0", "b0"):
        found.ask(50, "kv", name)
    found.join(Worker("b1", 20.0), "b")
    costs_ms = {
        candidate.incarnation: candidate.cost_ms
        for candidate in found.fleet.choose("kv", Question("x", Prompt(1000, BLOCK_SIZE), list(found.workers)), found.now_s).decode
    }
    assert costs_ms["b1"] == pytest.approx(costs_ms["b0"]) and costs_ms["a0"] < costs_ms["b1"] / 10


@pytest.mark.parametrize("policy", POLICIES)
def test_a_worker_whose_pool_is_too_small_for_a_prompt_is_passed_over(policy: str) -> None:
    found = Fleet(rng=random.Random(4))
    for name, num_blocks in (("small", 100), ("large", 1000), ("new", 0), ("p-small", 100), ("p-large", 1000)):
        found.join(name, name)
        found.report(name, WorkerReport(WorkerLoad(num_blocks=num_blocks)), 0.0)
    decode, prefill = ["small", "large", "new"], ["p-small", "p-large"]
    for num_tokens, fit in ((1600, {"small", "large", "new"}), (1601, {"large", "new"})):
        for number in range(20):
            answer = found.choose(policy, Question(f"r{number}", Prompt(num_tokens, 16), decode, prefill), 3.0 * number)
            assert {candidate.incarnation for candidate in answer.decode} == fit
            assert len(answer.prefill) == (2 if "small" in fit else 1)


def test_a_prompt_that_fits_nowhere_is_sent_to_a_worker_which_says_so() -> None:
    found = Fleet()
    for name in ("w0", "w1"):
        found.join(name, name)
        found.report(name, WorkerReport(WorkerLoad(num_blocks=100)), 0.0)
    answer = found.choose("kv", Question("r", Prompt(5000, 16), ["w0"], ["w1"]), 0.0)
    assert [candidate.incarnation for candidate in answer.decode] == ["w0"] and not answer.prefill
    found.leave("w0")
    found.leave("w1")
    found.join("w2", "w2")
    assert found.choose("kv", Question("r", Prompt(5000, 16), ["w2"]), 0.0).decode
