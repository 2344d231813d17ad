"""Row 30: hosts on which nothing can be kept. A peer runs there, and says what it cannot keep."""

import shlex
from pathlib import Path

import pytest

from tests.engines.trained import files_of, write_directory
from tests.harness import Host, Lan, Process
from tests.harness.processes import meshserve_command
from tests.lan.meshes import HTTP, READY_S

NO_HOME = {"XDG_CACHE_HOME": "/dev/null/nowhere", "HOME": "/dev/null"}
READ_ONLY = """
    mount -o bind,ro "$PWD" "$PWD"; cd "$PWD"
    for place in "$HOME" /tmp /var/tmp /run; do mount -t tmpfs -o ro none "$place"; done
"""
DISK_FULL = (
    'mount -t tmpfs -o size=8k none "$HOME"; head -c 8192 /dev/zero >"$HOME/all" 2>/dev/null'
)
"""What a shell does first, in a mount namespace of its own."""


def run_where(
    host: Host, place: str, *arguments: str, env: dict[str, str] | None = None
) -> Process:
    """Start `meshserve run` on this host, where `place` has made the files."""
    command = shlex.join(meshserve_command("run", *arguments))
    return host.start("unshare", "--mount", "sh", "-c", f"{place}\nexec {command}", env=env)


def complete(host: Host, model: str) -> None:
    """A chat is answered."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "say something"}],
        "max_tokens": 20,
    }
    answer = host.post_json(f"{HTTP}/v1/chat/completions", body)
    assert answer.status == 200 and answer.json()["choices"][0]["message"]["content"], answer.body


def drain(process: Process) -> None:
    process.terminate()
    assert process.wait() == 0


@pytest.mark.parametrize(
    ("place", "env"),
    [("", NO_HOME), (DISK_FULL, {}), pytest.param(READ_ONLY, {}, marks=pytest.mark.full)],
    ids=["no_home", "disk_full", "read_only"],
)
def test_row_30_a_processor_serves_and_says_what_it_cannot_keep(
    lan: Lan, tmp_path: Path, place: str, env: dict[str, str]
) -> None:
    front_host, worker_host = lan.add_host(), lan.add_host()
    directory = write_directory(tmp_path / "model", files_of("byte-level"))
    front = run_where(front_host, place, "--role", "frontend,processor,router", env=env)
    worker_host.run("--role", "decode", "--engine-opt", f"tokenizer={directory}")
    front.wait_for_line("^1 decode", READY_S)
    complete(front_host, "dummy")
    assert front.stderr_text.count("cannot be kept") == 1
    drain(front)


@pytest.mark.full
def test_row_30_a_worker_with_a_real_model_serves_where_nothing_can_be_written(
    lan: Lan, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    from tests.engines.tiny_models import make_model

    host, model = lan.add_host(), make_model(tmp_path / "tiny.gguf", seed=1)
    # the model's folder is mounted elsewhere first, as /tmp is empty then
    keep = f"mount --bind {shlex.quote(str(tmp_path))} /mnt"
    peer = run_where(
        host,
        f"{keep}\n{READ_ONLY}",
        "--role",
        "all",
        "--model",
        f"/mnt/{model.name}",
        env={"XDG_RUNTIME_DIR": ""},
    )
    name = (
        peer.wait_for_line("^1 decode, 1 prefill ready", 30.0)
        and host.get(f"{HTTP}/v1/models").json()["data"][0]["id"]
    )
    complete(host, name)
    for words in ("Read-only file system; engines on this host", "cannot be kept"):
        assert peer.stderr_text.count(words) == 1, peer.stderr_text
    drain(peer)
