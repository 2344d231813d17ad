"""`--model SPEC` on the command line of workers that serve real models."""

import sys
from pathlib import Path

import pytest

from tests.cli.test_mistakes import ALONE, assert_one_line, meshserve
from tests.harness import run_command

pytest.importorskip("meshserve.engines.llama", reason="the engine of real models is not here")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--engine", "llama"), "--engine llama needs --model SPEC"),
        (("--model", "no-such.gguf"), "there is no such file"),
        (("--engine", "llama", "--model", "smollm9"), "or one of: smollm2"),
        (("--model", "hf:nobody"), "is not hf:ORG/REPO[:FILE or quantization]"),
    ],
)
def test_a_model_that_cannot_be_meant_is_a_usage_error(arguments: tuple[str, ...], words: str) -> None:
    assert_one_line(meshserve("run", "--role", "decode", *ALONE, *arguments), 2, words)


def test_the_demo_refuses_a_model_before_it_starts_a_peer(tmp_path: Path) -> None:
    assert_one_line(meshserve("demo", "--once", "--model", f"{tmp_path}/no-such.gguf"), 2, "there is no such file")


@pytest.mark.parametrize("missing", [("numpy",), ("xllamacpp", "llama_cpp")])
def test_what_a_real_model_needs_is_said_before_it_is_fetched(missing: tuple[str, ...], tmp_path: Path) -> None:
    without = "".join(f"sys.modules[{name!r}] = None; " for name in missing)
    program = f"import sys; {without}from meshserve.cli.main import main; main()"
    done = run_command([sys.executable, "-c", program, "run", "--role", "decode", *ALONE, "--model", "smollm2"], 20.0)
    assert_one_line(done, 1, f"needs {missing[0]}: pip install 'meshserve[llama]'")
