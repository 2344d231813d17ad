"""`--model SPEC` on the command line of workers that serve real models."""

import sys
from pathlib import Path

import pytest

from meshserve.cli.model_options import engine_for, say_dummy
from meshserve.errors import UsageError
from tests.cli.test_mistakes import ALONE, assert_one_line, meshserve
from tests.harness import run_command

pytest.importorskip("meshserve.engines.llama", reason="the engine of real models is not here")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--engine", "llama"), "--engine llama needs --model SPEC"),
        (("--model", "no-such.gguf"), "there is no such file"),
        (("--engine", "llama", "--model", "smollm9"), "or one of: smollm2"),
        (("--model", ""), "--model is empty: name a .gguf file, hf:ORG/REPO or smollm2"),
        (("--engine", "dummy", "--model", ""), "--model is empty"),
        (("--model", "foo/bar"), "foo/bar is no model that is known: name a .gguf file, hf:ORG/REPO or smollm2"),
        (("--model", "hf:nobody"), "is not hf:ORG/REPO[:FILE or quantization]"),
    ],
)
def test_a_model_that_cannot_be_meant_is_a_usage_error(arguments: tuple[str, ...], words: str) -> None:
    assert_one_line(meshserve("run", "--role", "decode", *ALONE, *arguments), 2, words)


def test_what_is_there_is_no_name_for_the_dummy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="models is no model that is known"):
        engine_for("models")
    assert engine_for("x" * 10_000) == engine_for("other") == engine_for(None) == "dummy"
    assert engine_for("SmolLM2") == engine_for("smollm2") == "llama"


def test_a_plain_word_is_said_to_be_a_name_for_the_dummy(capsys: pytest.CaptureFixture[str]) -> None:
    for spec in (None, "dummy", "smollm2", "llama3"):
        say_dummy(spec)
    said = "meshserve: llama3 is a name for the dummy engine; a real model is a .gguf file, hf:ORG/REPO or smollm2\n"
    assert capsys.readouterr().err == said


def test_the_demo_refuses_a_model_before_it_starts_a_peer(tmp_path: Path) -> None:
    assert_one_line(meshserve("demo", "--once", "--model", "foo/bar"), 2, "foo/bar is no model that is known")
    assert_one_line(meshserve("demo", "--once", "--model", f"{tmp_path}/no-such.gguf"), 2, "there is no such file")


@pytest.mark.parametrize("missing", [("numpy",), ("xllamacpp", "llama_cpp")])
def test_what_a_real_model_needs_is_said_before_it_is_fetched(missing: tuple[str, ...], tmp_path: Path) -> None:
    without = "".join(f"sys.modules[{name!r}] = None; " for name in missing)
    program = f"import sys; {without}from meshserve.cli.main import main; main()"
    done = run_command([sys.executable, "-c", program, "run", "--role", "decode", *ALONE, "--model", "smollm2"], 20.0)
    assert_one_line(done, 1, f"needs {missing[0]}: pip install 'meshserve[llama]'")
