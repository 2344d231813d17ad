"""What other sequences did before, or do meanwhile, changes no logit: cells follow each other as positions do."""

import asyncio
import random
from array import array
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp")

from meshserve.engines.llama import LlamaEngine
from meshserve.engines.llama import slots as slots_module
from meshserve.engines.protocol import EngineOptions
from meshserve.wire.generation import GenerateRequest, Sampling
from tests.engines.dummy_harness import GenerationRecord
from tests.engines.tiny_models import DENSE, make_model

Outcome = tuple[list[int], list[object]]


async def outcome(engine: LlamaEngine, request_id: str, tokens: list[int], max_tokens: int) -> Outcome:
    sink = GenerationRecord()
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True, logprobs=1)
    engine.generate(GenerateRequest(request_id, "m", array("I", tokens), sampling), sink)
    await sink.end()
    assert sink.error is None
    return sink.tokens, list(sink.logprobs)


@pytest.mark.parametrize("kind", ["dense", "hybrid", "recurrent"])
async def check_others_change_nothing(options: EngineOptions, prompts: list[list[int]], lengths: list[int], *, reserves: bool) -> None:
    """Asked together, and again one by one, each prompt gets what it gets from an engine of its own."""
    busy, quiet = LlamaEngine(options), LlamaEngine(options)
    await busy.start()
    try:
        reserved = busy.reserve(GenerateRequest("reserved", "m", array("I", range(10, 60)), Sampling())) if reserves else None
        many = await asyncio.gather(*(outcome(busy, str(n), prompts[n], lengths[n]) for n in range(len(prompts))))
        again = [await outcome(busy, f"again {n}", prompts[n], lengths[n]) for n in range(len(prompts))]
        if reserved is not None:
            reserved.release()
    finally:
        await busy.close()
    for number, prompt in enumerate(prompts):
        await quiet.start()
        try:
            alone = await outcome(quiet, str(number), prompt, lengths[number])
        finally:
            await quiet.close()
        assert many[number] == alone and again[number] == alone, f"prompt {number}"


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of six layers: in the logits of one with two, the order of cells does not show."""
    return str(make_model(tmp_path_factory.mktemp("deep") / "deep.gguf", replace(DENSE, num_layers=6)))


def test_log_probabilities_are_the_same_bit_for_bit_after_many_others(deep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "_FEWEST_RELEASED", 64)
    monkeypatch.setattr(slots_module, "_MOST_REMOVED", 256)
    rng = random.Random(3)
    shared = [rng.randrange(10, 60) for _ in range(200)]
    prompts = [shared[: rng.choice((0, 70, 200))] + [rng.randrange(10, 60) for _ in range(rng.randrange(1, 120))] for _ in range(24)]
    options = EngineOptions(deep, {"threads": "1", "max_running": "4", "slots": "20"}, 8192)
    asyncio.run(check_others_change_nothing(options, prompts, [rng.randrange(2, 40) for _ in prompts], reserves=False))


@pytest.mark.parametrize("reserves", [False, True])
def test_a_pool_full_of_cached_prompts_changes_no_log_probability(deep: str, reserves: bool) -> None:
    rng = random.Random(4)
    prompts = [[rng.randrange(10, 60) for _ in range(rng.randrange(30, 100))] for _ in range(32)]
    options = EngineOptions(deep, {"threads": "1", "max_running": "4", "slots": "20"}, 2048)
    asyncio.run(check_others_change_nothing(options, prompts, [rng.randrange(10, 60) for _ in prompts], reserves=reserves))


def test_a_model_in_several_files_answers_as_the_model_in_one(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    async def run(path: Path) -> Outcome:
        engine = LlamaEngine(EngineOptions(str(path), {"threads": "1", "max_running": "4", "slots": "20"}, 1024))
        await engine.start()
        try:
            return await outcome(engine, "one", list(range(10, 60)), 8)
        finally:
            await engine.close()

    first = make_model(tmp_path / "parts.gguf", tensors_per_file=8)
    assert first.name.startswith("parts-00001-of-0000") and len(list(tmp_path.glob("parts-*.gguf"))) > 1
    assert asyncio.run(run(first)) == asyncio.run(run(tiny_files["dense"]))
