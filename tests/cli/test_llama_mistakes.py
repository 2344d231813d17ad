"""What users get wrong with real models: one line that says what to do, the exit code of the contract, and no harm to the mesh."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

from meshserve.engines.host import available_bytes
from meshserve.engines.llama.context import MAX_CELLS
from tests.api.clients import Clients
from tests.api.llama_mesh import MODEL, llama_clients, serving
from tests.engines.tiny_models import DENSE, MODELS, make_model, write_file
from tests.harness import Completed, meshserve_command, run_command

DEADLINE_S = 60.0
FEW_AT_ONCE = 2
MESH = "llama-mistakes"
ASK: Any = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models: one that is good, and what can be wrong with one."""
    folder = tmp_path_factory.mktemp("models")
    good = make_model(folder / "good.gguf").read_bytes()
    make_model(folder / "embedding.gguf", MODELS["embedding"])
    write_file(folder / "weightless.gguf", DENSE, {})
    changed = {
        "empty": b"",
        "zip": b"PK\3\4" + good[4:],
        "headless": good[:5000],
        "half": good[: len(good) // 2],
        "future": good[:4] + b"\x63" + good[5:],
        "foreign": good.replace(
            b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama", b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0lxama"
        ),
        "untemplated": good.replace(b"tokenizer.chat_template", b"tokenizer.chat_templatf"),
    }
    for name, data in changed.items():
        (folder / f"{name}.gguf").write_bytes(data)
    (folder / "none").mkdir()
    return folder


def run(*arguments: str, env: dict[str, str] | None = None, limit_kb: int | None = None) -> Completed:
    command = meshserve_command("run", "--role", "decode", "--mesh", MESH, "--interface", "127.0.0.1", "--no-mdns", *arguments)
    limited = command if limit_kb is None else ["sh", "-c", f'ulimit -v {limit_kb}; exec "$@"', "sh", *command]
    return run_command(limited, DEADLINE_S, env=env)


def check(done: Completed, exit_code: int, *words: str) -> None:
    assert done.exit_code == exit_code, done
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


Case = tuple[tuple[str, ...], int, tuple[str, ...]]
FILES: list[Case] = [
    (("half.gguf",), 1, ("is cut short", "download it again")),
    (("embedding.gguf",), 1, ("an embedding model", "use a model that generates text")),
    (("nothing.gguf",), 2, ("there is no such file", "in its folder: ")),
    (("",), 2, ("is a folder; name one of its files",)),
    (("none",), 2, ("there is no .gguf file in it",)),
    (("empty.gguf",), 1, ("is not a GGUF file; name a model",)),
    (("zip.gguf",), 1, ("is not a GGUF file; name a model",)),
    (("headless.gguf",), 1, ("download it again",)),
    (("future.gguf",), 1, ("version 99", "convert the model again")),
    (("foreign.gguf",), 1, ("'lxama'", "use another model")),
    (("weightless.gguf",), 1, ("cannot be loaded", "use another file")),
]
OPTIONS: list[Case] = [
    (("--engine-opt", "threads=0"), 2, ("threads is a whole number from 1 to 512, not '0'",)),
    (("--engine-opt", "context_length=63"), 2, ("context_length is a whole number from 64",)),
    (("--engine-opt", "context_length=4097"), 2, ("at most the model's own, 4096, not 4097",)),
    (("--engine-opt", "slots=9"), 2, ("slots is at least twice max_running",)),
    (("--engine-opt", "colour=red"), 2, ("no option 'colour'; it knows threads",)),
    (("--kv-cache-tokens", "127"), 2, ("--kv-cache-tokens is at least 128",)),
    (("--kv-cache-tokens", "134217729"), 2, ("--kv-cache-tokens is at most 134217728",)),
    (("--kv-type", "q4_0"), 2, ("'q4_0' is not one of 'q8_0', 'f16'",)),
]


def few_and_all(cases: list[Case]) -> list[Any]:
    """Each takes a second of a process's start: a few in the short tier, the others in the full one."""
    return [pytest.param(cases[:2], id="few"), pytest.param(cases[2:], id="others", marks=pytest.mark.full)]


@pytest.mark.parametrize("cases", few_and_all(FILES))
def test_a_file_that_is_no_usable_model_is_named_with_what_to_do(files: Path, cases: list[Case]) -> None:
    with ThreadPoolExecutor(FEW_AT_ONCE) as pool:
        found = pool.map(lambda case: run("--model", str(files / case[0][0])), cases)
        for done, ((name,), exit_code, words) in zip(found, cases, strict=True):
            check(done, exit_code, name, *words)


@pytest.mark.parametrize("cases", few_and_all(OPTIONS))
def test_an_option_out_of_range_is_named_with_its_range(files: Path, cases: list[Case]) -> None:
    with ThreadPoolExecutor(FEW_AT_ONCE) as pool:
        found = pool.map(lambda case: run("--model", str(files / "good.gguf"), *case[0]), cases)
        for done, (_, exit_code, words) in zip(found, cases, strict=True):
            check(done, exit_code, *words)


def test_a_kv_cache_that_memory_has_no_room_for_is_refused_before_it_is_taken(files: Path) -> None:
    if available_bytes() > MAX_CELLS * 200:
        pytest.skip("this machine has room for the largest KV cache of a tiny model")
    done = run("--model", str(files / "good.gguf"), "--kv-cache-tokens", str(MAX_CELLS))
    check(done, 1, "of memory are available: lower --kv-cache-tokens, or end other programs")


def test_a_library_of_another_version_is_refused_with_the_command_that_installs_the_right_one(files: Path, tmp_path: Path) -> None:
    (tmp_path / "xllamacpp").mkdir()
    (tmp_path / "xllamacpp" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "xllamacpp-1.0.dist-info").mkdir()
    (tmp_path / "xllamacpp-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: xllamacpp\nVersion: 1.0\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    done = run("--model", str(files / "good.gguf"), env={"PYTHONPATH": path})
    check(done, 1, "xllamacpp 1.0 is installed", "pip install 'xllamacpp==")


@pytest.fixture(scope="module")
def untemplated(files: Path) -> Iterator[Clients]:
    """Clients of a mesh whose model has no chat template."""
    with llama_clients(files / "untemplated.gguf", mesh=MESH, timeout_s=60.0) as made:
        yield made


def test_a_model_without_a_chat_template_completes_prompts_and_says_that_it_does_no_chats(untemplated: Clients) -> None:
    assert untemplated.openai.completions.create(model=MODEL, prompt="hi", max_tokens=3).usage
    asked = [
        ("/v1/chat/completions", ASK, "messages"),
        ("/v1/messages", ASK, "messages"),
        ("/v1/responses", {"model": MODEL, "input": "hi"}, "input"),
        ("/tokenize", ASK, "messages"),
    ]
    for path, body, param in asked:
        answer = untemplated.post(path, body)
        assert answer["status"] == 400 and answer["body"]["error"]["param"] == param
        assert "no chat template; /v1/completions takes its prompts" in answer["body"]["error"]["message"]


def test_a_prompt_longer_than_the_context_is_refused_in_openais_form(untemplated: Clients) -> None:
    for body in ({"prompt": "a" * 4096, "max_tokens": 1}, {"prompt": "a", "max_tokens": 4096}, {"prompt": [40] * 5000}):
        answer = untemplated.post("/v1/completions", {"model": MODEL, **body})
        error = answer["body"]["error"]
        assert answer["status"] == 400 and error["code"] == "context_length_exceeded" and error["param"] == "prompt"
        assert error["type"] == "invalid_request_error" and "maximum context length is 4096 tokens" in error["message"]


def test_a_peer_that_cannot_serve_its_model_leaves_the_mesh_unharmed(untemplated: Clients, files: Path) -> None:
    address = untemplated.http.get("/mesh/peers").json()[0]["address"].removeprefix("tcp://")
    assert run("--model", str(files / "half.gguf"), "--peer", address).exit_code == 1
    with serving(files / "embedding.gguf", "--peer", address, mesh=MESH) as process:
        assert process.wait(DEADLINE_S) == 1
    assert len(untemplated.http.get("/mesh/peers").json()) == 1
    assert untemplated.openai.completions.create(model=MODEL, prompt="hi", max_tokens=3).usage


@pytest.mark.full
def test_a_context_that_the_system_gives_no_memory_for_is_refused_in_one_line(files: Path) -> None:
    done = run("--model", str(files / "good.gguf"), "--kv-cache-tokens", "4000000", limit_kb=1_200_000)
    check(done, 1, "no memory for", "lower --kv-cache-tokens")
