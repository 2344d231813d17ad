"""Coding agents as they come from npm, with nothing set but address, key and model, against a disaggregated mesh with a script.

An agent has passed if it ran the tool that the model called (a file has changed), sent the tool's result, and ended with exit code 0;
then the conversation is resumed in another process.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness import Process, meshserve_command, run_command, wait_until

pytestmark = pytest.mark.full

READY_S, INSTALL_S, RUN_S = 20.0, 280.0, 120.0
MODEL, KEY = "dummy", "a-key-of-this-mesh"
PACKAGES = ("@anthropic-ai/claude-code", "@openai/codex")
POOL = ("num_blocks=32768", "context_length=400000")
"""A prompt of an agent has 80,000 bytes, which are as many tokens."""
ROLES = (("--role", "frontend,processor,router"), ("--role", "decode"), ("--role", "prefill"))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The newest of each agent, in an environment of its own."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("there is no npm to install the agents with")
    place = tmp_path_factory.mktemp("agents")
    command = [npm, "install", "--prefix", str(place), "--no-audit", "--no-fund", *PACKAGES]
    done = run_command(command, INSTALL_S, env={"HOME": str(place)})
    if done.exit_code:
        pytest.skip(f"npm cannot install the agents: {done.stderr.splitlines()[-1:]}")
    node, claude = shutil.which("node"), place / "node_modules" / PACKAGES[0]
    assert node is not None
    # its own script puts the program in place, and npm no longer runs such scripts unasked
    run_command(["env", "-C", str(claude), node, "install.cjs"], INSTALL_S)
    return place / "node_modules" / ".bin"


@contextmanager
def scripted_mesh(directory: Path, turns: list[dict[str, Any]]) -> Iterator[str]:
    """The address of a disaggregated mesh whose model keeps to a script."""
    script = directory / "script.json"
    script.write_text(json.dumps(turns))
    options = [part for option in (*POOL, f"script={script}") for part in ("--engine-opt", option)]
    mesh = ("--mesh", f"agents-{directory.name}", "--interface", "127.0.0.1", "--no-mdns", *options)
    http = ("--http", "127.0.0.1:0", "--api-key", KEY)
    with Process(meshserve_command("run", *ROLES[0], *mesh, *http)) as front:
        ready = front.ready(READY_S)
        seed = ("--peer", ready["address"].removeprefix("tcp://"))
        decode, prefill = (meshserve_command("run", *roles, *mesh, *seed) for roles in ROLES[1:])
        with Process(decode) as second, Process(prefill) as third:
            wait_until(lambda: num_peers(ready["http"]) == len(ROLES), READY_S, "all peers meet")
            yield ready["http"]
            for process in (front, second, third):
                assert "Traceback" not in process.stderr_text


def num_peers(url: str) -> int:
    return len(httpx.get(f"{url}/mesh/peers", headers={"authorization": f"Bearer {KEY}"}).json())


def claude(programs: Path, url: str, home: Path, work: Path, prompt: str, *, resumes: bool) -> list[str]:
    settings = (f"ANTHROPIC_BASE_URL={url}", f"ANTHROPIC_API_KEY={KEY}", f"ANTHROPIC_MODEL={MODEL}", f"HOME={home}")
    command = [str(programs / "claude"), "-p", prompt, "--permission-mode", "acceptEdits", *(["-c"] if resumes else [])]
    return ["env", "-C", str(work), *settings, *command]


def codex(programs: Path, url: str, home: Path, work: Path, prompt: str, *, resumes: bool) -> list[str]:
    settings = (f"CODEX_API_KEY={KEY}", f"CODEX_HOME={home}", f"HOME={home}")
    options = ["-c", f'openai_base_url="{url}/v1"', "-m", MODEL, "--dangerously-bypass-approvals-and-sandbox", "--skip-git-repo-check"]
    resumed = ["resume", "--last"] if resumes else []
    return ["env", "-C", str(work), *settings, str(programs / "codex"), "exec", *resumed, *options, prompt]


AGENTS: dict[str, tuple[Callable[..., list[str]], Callable[[Path], dict[str, Any]]]] = {
    "Claude Code": (claude, lambda file: {"name": "Write", "arguments": {"file_path": str(file), "content": "made by a tool"}}),
    "Codex CLI": (codex, lambda file: {"name": "exec_command", "arguments": {"cmd": f"printf 'made by a tool' > {file}"}}),
}


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_runs_the_tool_that_the_model_calls_and_resumes_the_conversation(
    name: str, programs: Path, tmp_path: Path
) -> None:
    command, call = AGENTS[name]
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    file = work / "made.txt"
    turns: list[dict[str, Any]] = [
        {"reasoning": "A tool can do that.", "text": "I write the file.", "calls": [call(file)]},
        {"text": "The file is written."},
        {"text": "The file is still there."},
    ]
    with scripted_mesh(tmp_path, turns) as url:
        first = run_command(command(programs, url, home, work, "Write the file", resumes=False), RUN_S)
        assert first.exit_code == 0, first.stderr
        assert file.read_text() == "made by a tool"
        assert "The file is written." in first.stdout
        again = run_command(command(programs, url, home, work, "Is it there?", resumes=True), RUN_S)
        assert again.exit_code == 0, again.stderr
        assert "The file is still there." in again.stdout
