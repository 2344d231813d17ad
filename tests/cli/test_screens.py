"""`peers --watch` and `top` on real terminals of several sizes, and through a pipe."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness import Process, run_command, wait_until
from tests.harness.processes import child_environment, meshserve_command
from tests.harness.tmux import Screen, has_tmux

READY_S = 10.0
ALONE = ("--interface", "127.0.0.1", "--no-mdns")
COMMANDS = {"peers": ("peers", "--watch"), "top": ("top",)}
HEADS = {"peers": "NAME ", "top": "PEER "}
QUITS = {"peers": "q quits", "top": "q quit "}

needs_tmux = pytest.mark.skipif(not has_tmux(), reason="there is no tmux")
both = pytest.mark.parametrize("view", list(COMMANDS))


@pytest.fixture(scope="module")
def mesh() -> Iterator[dict[str, Process]]:
    """Three peers on loopback; `seed` of the first is where to join."""
    with ExitStack() as stack:
        front = stack.enter_context(
            Process(meshserve_command("run", "--role", "frontend,processor,router", "--name", "front", "--http", "127.0.0.1:0", *ALONE))
        )
        seed = front.ready(READY_S)["address"].removeprefix("tcp://")
        peers = {"front": front}
        for name in ("decode-1", "prefill-1"):
            command = meshserve_command("run", "--role", name.partition("-")[0], "--name", name, "--peer", seed, *ALONE)
            peers[name] = stack.enter_context(Process(command))
        for process in peers.values():
            process.ready(READY_S)
        front.wait_for_line("^1 decode, 1 prefill ready", READY_S)
        yield peers


def joining(mesh: dict[str, Process]) -> tuple[str, ...]:
    return (*ALONE, "--peer", mesh["front"].ready()["address"].removeprefix("tcp://"))


def screen(mesh: dict[str, Process], view: str, directory: Path, width: int = 80, height: int = 24) -> Screen:
    return Screen(meshserve_command(*COMMANDS[view], *joining(mesh)), width, height, directory)


def assert_whole(lines: list[str], view: str, width: int, height: int) -> None:
    """A frame that fills the screen: no line too long or broken, the keys at the foot."""
    assert all(len(line) <= width for line in lines)
    assert QUITS[view] in lines[height - 1], "\n".join(lines)
    assert sum(HEADS[view].strip() in line for line in lines) == 1
    assert not any("Traceback" in line for line in lines)


@needs_tmux
@both
def test_a_view_fits_every_size_and_q_leaves_the_terminal_as_it_was(mesh: dict[str, Process], view: str, tmp_path: Path) -> None:
    with screen(mesh, view, tmp_path) as shown:
        assert_whole(shown.wait_for("prefill-1"), view, 80, 24)
        for width, height, words in ((200, 50, "127.0.0.1:" if view == "peers" else "USED"), (50, 8, "STATE"), (80, 24, "prefill-1")):
            shown.resize(width, height)
            wait_until(lambda height=height: QUITS[view] in shown.lines()[height - 1], 5.0, f"a frame of {height} lines")  # type: ignore[misc]
            assert_whole(shown.wait_for(words), view, width, height)
        shown.press("q")
        assert shown.wait_for_end() == 0
        assert HEADS[view].strip() not in shown.text()  # back on the normal screen, where nothing of it is left
        raw = shown.raw()
        assert b"\x1b[?1049h" in raw and raw.rstrip().endswith(b"\x1b[?1049l")
        assert raw.count(b"\x1b[?25l") == raw.count(b"\x1b[?25h") == 1
        frames = raw.split(b"\x1b[?2026h")[1:]  # each drawn over the one before, none after clearing anything
        assert len(frames) > 3
        assert all(frame.startswith(b"\x1b[H") and b"\x1b[2J" not in frame and b"\x1b[K" not in frame for frame in frames)


@needs_tmux
def test_top_sorts_selects_and_shows_everything_of_a_peer(mesh: dict[str, Process], tmp_path: Path) -> None:
    with screen(mesh, "top", tmp_path, 120, 30) as shown:
        shown.wait_for("↑PEER")
        shown.press("r")
        rows = shown.wait_for("↓PEER")
        names = [found[1] for line in rows if (found := re.match(r"(decode-1|front|prefill-1) ", line))]
        assert names == ["prefill-1", "front", "decode-1"]
        shown.press("Right", "Right", "Right")
        shown.wait_for("BATCH")
        shown.press("Left", "Left", "Left", "r", "Down")
        shown.press("Enter")
        details = "\n".join(shown.wait_for("instance id"))
        assert "front  frontend,processor,router  alive since" in details and "esc back" in details
        shown.press("Escape")
        shown.wait_for("↑PEER")
        shown.press("C-c")
        assert shown.wait_for_end() == 0


@both
def test_a_pipe_gets_plain_text(mesh: dict[str, Process], view: str) -> None:
    with Process(meshserve_command(*COMMANDS[view], *joining(mesh))) as process:
        wait_until(lambda: len([line for line in process.stdout if HEADS[view].strip() in line.text]) >= 2, 10.0, "printed twice")
        process.interrupt()
        assert process.wait() == 130
        assert "\x1b" not in process.stdout_text and not process.stderr_text
        assert "frontend,processor,router" in process.stdout_text


@pytest.mark.parametrize("command", ["peers", "peers --watch", "top", "doctor"])
def test_a_reader_that_has_seen_enough_is_no_failure(mesh: dict[str, Process], command: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with subprocess.Popen(
        meshserve_command(*command.split(), *joining(mesh)), env=child_environment(), stdout=writing, stderr=subprocess.PIPE
    ) as process:
        os.close(writing)
        assert process.stderr is not None and process.stderr.read() == b"" and process.wait(READY_S) == 0


def test_peers_once_as_table_and_as_json(mesh: dict[str, Process]) -> None:
    shown = run_command(meshserve_command("peers", *joining(mesh)))
    assert shown.exit_code == 0 and "\x1b" not in shown.stdout and not shown.stderr
    assert all(name in shown.stdout for name in mesh) and "BLOCKS" in shown.stdout and "SINCE" in shown.stdout
    found = json.loads(run_command(meshserve_command("peers", "--json", *joining(mesh))).stdout)
    assert {peer["name"] for peer in found} == set(mesh)
    assert all(peer["since_s"] > 0 and peer["refused"] == [] and peer["version"] for peer in found)


def test_a_peer_that_ends_is_shown_as_gone(mesh: dict[str, Process]) -> None:
    command = meshserve_command("run", "--role", "decode", "--name", "short-lived", *joining(mesh))
    with Process(command) as process:
        process.ready(READY_S)
        mesh["front"].wait_for_line("short-lived", READY_S)
        process.terminate()
        assert process.wait() == 0
    shown = run_command(meshserve_command("peers", *joining(mesh)))
    assert re.search(r"gone +short-lived at 127.0.0.1:\d+: (left|ended without goodbye), \d+ s ago", shown.stdout), shown
