"""A tokenizer that one host has, and all hosts speak."""

import re
from pathlib import Path
from typing import Any

import pytest

from meshserve.engines.tokenizers.huggingface import HuggingFaceTokenizer
from tests.engines.trained import files_of, write_directory
from tests.harness import Host, Lan, Process
from tests.lan.meshes import HTTP, READY_S

FRONT = ("--role", "frontend,processor,router")
HI = [{"role": "user", "content": "say something"}]


def ask(host: Host, model: str, **fields: Any) -> dict[str, Any]:
    """One greedy chat."""
    response = host.post_json(f"{HTTP}/v1/chat/completions", {"model": model, "messages": HI, "max_tokens": 20, **fields}, timeout_s=60.0)
    assert response.status == 200, response.body
    answer: dict[str, Any] = response.json()
    return answer


def start(lan: Lan, host: Host, workers: dict[str, tuple[Host, str]]) -> tuple[Process, list[Process]]:
    front = host.run(*FRONT)
    running = [
        where.run("--role", "decode", "--model", model, "--engine-opt", f"tokenizer={tokenizer}")
        for model, (where, tokenizer) in workers.items()
    ]
    front.wait_for_line(f"^{len(workers)} decode", READY_S)
    return front, running


def counters(host: Host, name: str) -> float:
    """The sum over all peers."""
    text = host.get(f"{HTTP}/metrics").body.decode()
    return sum(float(value) for value in re.findall(rf"^meshserve_{name}_total{{.*}} (\S+)$", text, re.MULTILINE))


def test_a_processor_fetches_what_the_worker_has_once_and_keeps_it(lan: Lan, tmp_path: Path) -> None:
    front_host, worker_host = lan.add_host(), lan.add_host()
    directory = write_directory(tmp_path / "model", files_of("byte-level"))
    front, workers = start(lan, front_host, {"dummy": (worker_host, str(directory))})
    answer = ask(front_host, "dummy")
    tokenizer = HuggingFaceTokenizer(files_of("byte-level"))
    num_prompt = len(tokenizer.encode("<s><|user|>say something</s><|assistant|>", add_special_tokens=False))
    assert answer["usage"]["prompt_tokens"] == num_prompt
    text = answer["choices"][0]["message"]["content"]
    assert text and "\ufffd" not in text
    assert counters(front_host, "model_file_bytes_fetched") == sum(map(len, files_of("byte-level").values()))
    assert len(list((front_host.home / "meshserve" / "files").iterdir())) == 2
    for process in (front, *workers):
        process.terminate()
        assert process.wait() == 0
    start(lan, front_host, {"dummy": (worker_host, str(directory))})
    assert ask(front_host, "dummy")["choices"][0]["message"]["content"] == text
    assert counters(front_host, "model_file_bytes_fetched") == 0 and counters(front_host, "model_files_from_cache") == 2


@pytest.mark.full
def test_mixed_models_in_one_mesh_keep_their_own_tokenizers(lan: Lan, tmp_path: Path) -> None:
    hosts = [lan.add_host() for _ in range(3)]
    kinds = {"first": "byte-level", "second": "byte-fallback"}
    workers = {model: (hosts[1], str(write_directory(tmp_path / model, files_of(kind)))) for model, kind in kinds.items()}
    start(lan, hosts[0], {**workers, "third": (hosts[2], "bytes")})
    for model, kind in kinds.items():
        expected = HuggingFaceTokenizer(files_of(kind)).encode("<s><|user|>say something</s><|assistant|>", add_special_tokens=False)
        assert ask(hosts[0], model)["usage"]["prompt_tokens"] == len(expected)
    assert ask(hosts[0], "third")["usage"]["prompt_tokens"] == len("user: say something\nassistant:")
