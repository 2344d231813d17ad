"""Row 40: a peer whose terminal, pipe or disk takes nothing more serves on, and says so once where it still can."""

import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.harness import Lan, wait_until
from tests.harness.processes import meshserve_command
from tests.harness.waiting import pace
from tests.lan.meshes import HTTP, READY_S, LanMesh, text_of

FAILURE_TIMEOUT_S = 1.0
FULL_PIPE = "(head -c 65536 /dev/zero; exec {run}) "
"""A pipe's whole buffer, then the peer: what it writes first has no room."""


def start_in_shell(lan: Lan, template: str, *options: str) -> LanMesh:
    """A frontend whose outputs a shell leads elsewhere, `{run}` being its command, and a decode worker on another host."""
    front, host = lan.add_host(), lan.add_host()
    timeout = ("--failure-timeout", str(FAILURE_TIMEOUT_S))
    command = shlex.join(meshserve_command("run", "--role", "frontend,processor,router", *timeout, *options))
    mesh = LanMesh(front, front.start("bash", "-c", template.format(run=command)))
    mesh.decode = [host.run("--role", "decode", "--log-level", "info", *timeout)]
    wait_until(lambda: is_ready(mesh), READY_S, "the mesh serves")
    return mesh


def is_ready(mesh: LanMesh) -> bool:
    try:
        return mesh.front.get(f"{HTTP}/ready").status == 200
    except OSError:
        return False


def serve_beyond_the_failure_timeout(lan: Lan, mesh: LanMesh) -> None:
    """Requests are answered for as long as a peer that hung would need to be noticed, while workers come and go, which is printed."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < 3 * FAILURE_TIMEOUT_S:
        assert text_of(mesh.complete(f"at {time.monotonic()}"))
        pace(0.05)
    passing = lan.hosts[1].run("--role", "decode")
    wait_until(lambda: len(mesh.peers()) == 3, READY_S, "a worker came")
    passing.terminate()
    assert passing.wait() == 0
    wait_until(lambda: len(mesh.peers()) == 2, READY_S, "a worker left")
    assert text_of(mesh.complete("at the end"))
    assert not mesh.decode[0].find_line("died|silent|lost its connection"), mesh.decode[0].stderr_text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{run} | head -1", "cannot write to stdout: Broken pipe"),
        ("{run} 2>&1 | head -1", ""),
        ("{run} >/dev/full", "cannot write to stdout: No space left on device"),
        ("{run} 2>/dev/full", "cannot write to stderr: No space left on device"),
        ("{run} >/dev/full 2>&1", ""),
        ("{run} >&- 2>&-", ""),
        (FULL_PIPE + "| sleep 1000", "cannot write to stdout: it takes no more"),
        (FULL_PIPE + "2>&1 | sleep 1000", ""),
    ],
    ids=["reader_left", "both_readers_left", "disk_full", "log_disk_full", "both_disks_full", "closed", "pipe_full", "both_pipes_full"],
)
def test_row_40_outputs_that_take_nothing_hurt_no_request_and_no_heartbeat(lan: Lan, template: str, words: str) -> None:
    mesh = start_in_shell(lan, template, "--log-level", "info")
    serve_beyond_the_failure_timeout(lan, mesh)
    if words:
        mesh.frontend.wait_for_line(words, READY_S)
        shown = f"{mesh.frontend.stdout_text}\n{mesh.frontend.stderr_text}"
        assert shown.count("cannot write to") == 1, shown
    assert not mesh.frontend.find_line("Traceback")


def test_row_40_a_reader_that_comes_back_is_told_how_many_lines_it_missed(lan: Lan, tmp_path: Path) -> None:
    go_on, log = tmp_path / "go-on", tmp_path / "log"
    os.mkfifo(go_on)
    mesh = start_in_shell(lan, FULL_PIPE + f"| (cat {go_on}; cat) >{log}")
    serve_beyond_the_failure_timeout(lan, mesh)
    go_on.write_text("now\n")
    wait_until(lambda: b"no workers" in log.read_bytes() or b"1 decode" in log.read_bytes(), READY_S, "what waited is written")
    assert b"ready name=" in log.read_bytes()


@pytest.mark.parametrize("kind", ["full_disk", "fifo_without_a_reader", "fifo_that_nobody_reads"])
def test_row_40_a_record_that_takes_nothing_ends_with_one_warning(lan: Lan, tmp_path: Path, kind: str) -> None:
    path = Path("/dev/full") if kind == "full_disk" else tmp_path / "fifo"
    reader = -1
    if kind != "full_disk":
        os.mkfifo(path)
    if kind == "fifo_that_nobody_reads":
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mesh = start_in_shell(lan, "{run}", "--record", str(path))
    for number in range(600 if reader >= 0 else 1):
        if mesh.frontend.find_line("--record"):
            break
        mesh.complete(f"question {number}", max_tokens=64)
    serve_beyond_the_failure_timeout(lan, mesh)
    reason = "No space left on device" if kind == "full_disk" else "nobody reads it|takes no more"
    mesh.frontend.wait_for_line(f"--record .*: ({reason}); nothing is recorded from now on", READY_S)
    assert mesh.frontend.stderr_text.count("nothing is recorded") == 1
    if reader >= 0:
        os.close(reader)


def test_a_host_whose_name_has_a_space_has_a_peer_whose_name_has_none(lan: Lan) -> None:
    rename = "import os, socket, sys; socket.sethostname('my host'); os.execvp(sys.argv[1], sys.argv[1:])"
    command = meshserve_command("run", "--role", "decode")
    peer = lan.add_host().start("unshare", "--uts", sys.executable, "-c", rename, *command)
    assert peer.ready(READY_S)["name"].startswith("my-host-")


def test_a_host_without_any_interface_has_a_peer_all_the_same(lan: Lan) -> None:
    peer = lan.add_host().start("unshare", "--net", *meshserve_command("run", "--role", "all"))
    peer.wait_for_line("^1 decode, 1 prefill ready", READY_S)
    assert len(peer.stderr) <= 2 and not peer.find_line("Traceback")


def test_row_40_a_terminal_that_is_gone_drains_the_peer(lan: Lan) -> None:
    host = lan.add_host()
    worker = host.run("--role", "decode")
    worker.ready(READY_S)
    os.kill(worker.pid, signal.SIGHUP)
    assert worker.wait() == 0
