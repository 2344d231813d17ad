"""Engines keep the rules that all engines must keep."""

import asyncio
import os
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from meshserve.engines.conformance import CHECKS, Promise, Report, Subject, check_engine
from meshserve.engines.dummy import DummyEngine
from meshserve.engines.protocol import Engine, EngineOptions, GenerationSink, GenerationStats, Reservation
from meshserve.engines.tokenizers import EOS_TOKEN
from meshserve.errors import Unsupported
from meshserve.wire.generation import GenerateRequest

TINY_PROMISES = {
    "dense": Promise.COMPANY,
    "moe": Promise.PATHS,  # llama.cpp sums a router's weights in another order for one token than for several
    "sliding-window": Promise.COMPANY,  # as far as the check goes: in a pool that was used for long, cells come in another order
    "hybrid": Promise.COMPANY,
    "recurrent": Promise.COMPANY,
}
ABOUT_COMPANY = {"company_changes_nothing", "another_worker_continues", "another_worker_continues_whatever_was_asked"}


def a_dummy() -> DummyEngine:
    return DummyEngine(EngineOptions(options={"kv_bytes_per_token": "24", "block_size": "4", "num_blocks": "16", "max_batch": "6"}))


def a_llama(path: Path, promise: Promise) -> Subject:
    from meshserve.engines.llama import LlamaEngine

    options = EngineOptions(model=str(path), kv_cache_tokens=1024, options={"slots": "6", "max_running": "3", "threads": "1"})
    return Subject(lambda: LlamaEngine(options), end_token=2, promise=promise)


def run(subject: Subject, name: str) -> bool:
    """Whether the engine does what the rule is about. Raises AssertionError if it does so against the rule."""
    try:
        asyncio.run(CHECKS[name](subject))  # type: ignore[arg-type]  # checks are coroutine functions
    except Unsupported:
        return False
    return True


@pytest.mark.parametrize("name", CHECKS)
def test_the_dummy_engine_keeps_the_rule(name: str) -> None:
    assert run(Subject(a_dummy, end_token=EOS_TOKEN), name)


@pytest.mark.parametrize("kind", TINY_PROMISES)
@pytest.mark.parametrize("name", CHECKS)
def test_the_llama_engine_keeps_the_rule(name: str, kind: str, tiny_files: dict[str, Path]) -> None:
    promise = TINY_PROMISES[kind]
    assert run(a_llama(tiny_files[kind], promise), name) is (promise >= Promise.COMPANY or name not in ABOUT_COMPANY)


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CHECKS)
def test_a_real_model_keeps_the_rule(name: str) -> None:
    pytest.importorskip("xllamacpp")
    # a pool with holes puts cells out of order: sums differ then, and with some thirty layers that is seen
    assert run(a_llama(_real_model(), Promise.PATHS), name) is (name not in ABOUT_COMPANY)


def _real_model() -> Path:
    """The file that the environment names, or the packaged model if somebody fetched it before."""
    from meshserve.engines.models.directories import places

    named = os.environ.get("MESHSERVE_TEST_GGUF")
    found = [Path(named)] if named else [path for place in places() for path in sorted(place.glob("SmolLM2*.gguf"))]
    if not found or not found[0].is_file():
        pytest.skip("no real model: MESHSERVE_TEST_GGUF names the file of one")
    return found[0]


# --- the checks themselves


class _Echo:
    """An engine around the dummy, for engines that break one rule."""

    def __init__(self) -> None:
        self._engine = a_dummy()

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)


class _ForgetsToEnd(_Echo):
    def generate(self, request: GenerateRequest, sink: GenerationSink, reservation: Reservation | None = None) -> None:
        class Twice:
            on_tokens, on_error, on_prompt_logprobs = sink.on_tokens, sink.on_error, sink.on_prompt_logprobs

            def on_finish(self, reason: str, stats: GenerationStats) -> None:
                sink.on_finish(reason, stats)
                sink.on_finish(reason, stats)

        self._engine.generate(request, Twice(), reservation)


class _DoesNotCancel(_Echo):
    def cancel(self, request_id: str) -> None:
        pass


class _TakesLongBlocks(_Echo):
    def reserve(self, request: GenerateRequest) -> object:
        reservation = self._engine.reserve(request)
        write = reservation.write
        reservation.write = lambda blocks, on_done: write(  # type: ignore[method-assign]
            [(index, payload[:96]) for index, payload in blocks], on_done
        )
        return reservation


class _DependsOnItsPast(_Echo):
    async def start(self) -> None:
        await self._engine.start()
        self._num_requests = 0

    def generate(self, request: GenerateRequest, sink: GenerationSink, reservation: Reservation | None = None) -> None:
        self._num_requests += 1
        request.sampling.seed += self._num_requests
        self._engine.generate(request, sink, reservation)


@pytest.mark.parametrize(
    ("broken", "found_by", "words"),
    [
        (_ForgetsToEnd, "a_request_ends_once_with_all_its_tokens", "not called after its end"),
        (_DoesNotCancel, "cancelled_requests_are_silent", "before its first step"),
        (_TakesLongBlocks, "unfit_payloads_are_refused", "unfit bytes for block 0"),
        (_DependsOnItsPast, "equal_requests_get_equal_tokens", "equal requests"),
    ],
)
def test_a_broken_rule_is_reported_with_its_words(broken: Callable[[], Engine], found_by: str, words: str) -> None:
    report = asyncio.run(check_engine(Subject(broken, end_token=EOS_TOKEN, deadline_s=2), [found_by]))
    assert not report.is_conformant and report.named("failed") == [found_by]
    assert words in str(report)


def test_a_report_says_what_passed_and_what_was_left_out() -> None:
    report = asyncio.run(check_engine(Subject(a_dummy), ["ids_are_one_request_each", "an_end_of_the_model_ends_the_output"]))
    assert isinstance(report, Report) and report.is_conformant
    assert report.named("passed") == ["ids_are_one_request_each"]
    assert report.named("skipped") == ["an_end_of_the_model_ends_the_output"]
    assert "no way to make this model end" in str(report)


def test_prompts_are_the_same_for_the_same_number() -> None:
    subject = Subject(a_dummy)
    assert subject.prompt(9, 3) == subject.prompt(20, 3)[:9] != subject.prompt(9, 4)
    assert subject.prompt(0) == array("I")
