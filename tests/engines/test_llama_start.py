"""A worker of the llama engine starts: what it says, and what it leaves to others on its host."""

from pathlib import Path

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

from meshserve.engines.claims import Claim, Share
from meshserve.engines.llama import LlamaEngine
from meshserve.engines.llama.options import fair_share
from meshserve.engines.protocol import EngineOptions
from meshserve.errors import StartupFailed, UsageError
from tests.engines.tiny_models import MODELS, TinyModel, make_model
from tests.harness import Process, meshserve_command, run_async

ALONE = ("--interface", "127.0.0.1", "--no-mdns")


@pytest.fixture(autouse=True)
def own_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine of another test, or of this machine, counts."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def claimed() -> Share:
    """By all that there are."""
    found = []

    def decide(others: Share) -> Share:
        found.append(others)
        return Share(0, 0)

    claim = Claim()
    claim.make(decide)
    claim.update(None)
    return found[0]


def test_a_worker_says_what_it_takes_after_its_ready_line(tiny_files: dict[str, Path]) -> None:
    options = ("--kv-cache-tokens", "1024", "--engine-opt", "threads=1", "--served-model-name", "tiny")
    with Process(meshserve_command("run", "--role", "decode", *ALONE, "--model", str(tiny_files["dense"]), *options)) as process:
        process.ready(60.0)
        assert len(process.stdout) == 1
        said = process.wait_for_line("KV cache", 10.0).string
        assert said.startswith("meshserve: tiny: KV cache of 1,024 tokens, 0 MB (q8_0: half of f16")
        assert "1 thread; its KV can be handed over" in said
        assert said.endswith("; sequences end at 1,024 of 4,096 tokens: raise --kv-cache-tokens for longer ones")
        assert claimed() == Share(0, 1)
        process.terminate()
        assert process.wait() == 0
    assert claimed() == Share(0, 0)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            TinyModel("gemma3", {"attention.sliding_window": 32}, num_layers=6),
            "its KV cannot be handed over: its sliding window of 32 tokens",
        ),
        (MODELS["recurrent"], "its KV can be handed over"),
    ],
)
def test_an_engine_says_whether_its_kv_can_be_handed_over(model: TinyModel, words: str, tmp_path: Path) -> None:
    async def described() -> str:
        engine = LlamaEngine(EngineOptions(str(make_model(tmp_path / "model.gguf", model)), {"threads": "2"}, 1024, "f16"))
        try:
            await engine.start()
            return engine.description
        finally:
            await engine.close()

    said = run_async(described())
    assert "(f16: twice q8_0" in said and f"2 threads; {words}" in said


def test_what_was_asked_for_is_claimed_as_it_is_and_given_back(tiny_files: dict[str, Path]) -> None:
    engine = LlamaEngine(EngineOptions(str(tiny_files["dense"]), {"threads": "3"}, 1024))
    assert claimed().threads == 3 and claimed().pending_bytes == 1024 * engine.kv_layout.bytes_per_token
    run_async(engine.close())
    assert claimed() == Share(0, 0)


def test_the_usual_pool_leaves_out_what_others_will_take(tiny_files: dict[str, Path]) -> None:
    other = Claim()
    other.make(lambda others: Share(1 << 60, 1000))
    with pytest.raises(Exception, match="room for a KV cache of 0 tokens only"):
        LlamaEngine(EngineOptions(str(tiny_files["dense"])))
    other.update(Share(0, 1000))
    engine = LlamaEngine(EngineOptions(str(tiny_files["dense"])))
    assert claimed().threads == 1001, "one thread is always left"
    run_async(engine.close())
    other.update(None)


def test_engines_that_are_refused_leave_no_claim(tiny_files: dict[str, Path]) -> None:
    with pytest.raises(UsageError):
        LlamaEngine(EngineOptions(str(tiny_files["dense"]), {}, 64))
    assert claimed() == Share(0, 0)


def test_a_context_longer_than_the_models_own_is_refused_with_its_length(tiny_files: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="context_length is at most the model's own, 4096, not 4097"):
        LlamaEngine(EngineOptions(str(tiny_files["dense"]), {"context_length": "4097"}, 1024))
    for text in ("1", "63", "²", "٣٠٠", "9" * 5000):
        with pytest.raises(UsageError, match="context_length is a whole number from 64"):
            LlamaEngine(EngineOptions(str(tiny_files["dense"]), {"context_length": text}, 1024))
    assert claimed() == Share(0, 0)


def test_a_model_whose_context_is_shorter_than_a_block_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path / "short.gguf", TinyModel("llama", {"context_length": 1}))
    for tokens in (None, 1024):
        with pytest.raises(StartupFailed, match="has a context of 1 tokens, and 64 are the least"):
            LlamaEngine(EngineOptions(str(path), {}, tokens))
    with pytest.raises(StartupFailed, match="has a context of 1 tokens"):
        fair_share(path, 2)


def test_engines_that_start_together_take_together_what_one_would_take(tiny_files: dict[str, Path]) -> None:
    alone, threads = fair_share(tiny_files["dense"], 1)
    third, threads_of_three = fair_share(tiny_files["dense"], 3)
    assert alone - 3 * 64 <= 3 * third <= alone and threads_of_three == max(1, threads // 3)
    assert claimed() == Share(0, 0)
