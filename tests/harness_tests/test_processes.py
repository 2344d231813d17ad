"""Child processes: watched, signalled, and never left."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.harness import Process, run_command, wait_until

READY = "ready name=box-1234 roles=decode,prefill mesh=default address=tcp://10.77.0.1:7800 http=http://127.0.0.1:8000"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def state(process: Process) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_the_ready_line_is_parsed_among_others() -> None:
    with Process(["sh", "-c", f"echo not ready; echo '{READY}'; sleep 60"]) as process:
        fields = process.ready(2.0)
    assert fields["name"] == "box-1234"
    assert fields["roles"].split(",") == ["decode", "prefill"]
    assert (fields["mesh"], fields["address"], fields["http"]) == ("default", "tcp://10.77.0.1:7800", "http://127.0.0.1:8000")


def test_one_that_ends_before_it_is_ready_fails_at_once_with_its_output() -> None:
    start = time.monotonic()
    explained = pytest.raises(AssertionError, match=r"(?s)ended before.*exit code 2.*starting.*no such role")
    with Process(["sh", "-c", "echo starting; echo no such role >&2; exit 2"]) as process, explained:
        process.ready(30.0)
    assert time.monotonic() - start < 5.0


def test_a_line_that_does_not_come_fails_with_the_output_so_far() -> None:
    with Process(["sh", "-c", "echo something else; sleep 60"]) as process:
        process.wait_for_line("something", 2.0)
        with pytest.raises(AssertionError, match=r"(?s)a line like 'peer'.*running.*something else"):
            process.wait_for_line("peer", 0.05)


def test_lines_are_timed_and_can_be_looked_for_after_a_moment() -> None:
    with Process(["sh", "-c", "echo tick; kill -STOP $$; echo tick"]) as process:
        process.wait_for_line("tick", 2.0)
        wait_until(lambda: state(process) == "T", 2.0, "it stopped itself")
        moment = time.monotonic()
        assert process.find_line("tick", since=moment) is None
        process.resume()
        process.wait_for_line("tick", 2.0, since=moment)
        assert process.stdout[0].at < moment <= process.stdout[1].at


def test_output_is_complete_after_the_end_even_without_a_last_newline() -> None:
    done = run_command(["sh", "-c", "seq 5000; printf last; printf oops >&2; exit 3"])
    assert done.exit_code == 3
    assert done.stdout.split("\n") == [*map(str, range(1, 5001)), "last"]
    assert done.stderr == "oops"


def test_a_stopped_process_stands_still_until_it_is_resumed() -> None:
    with Process(["sleep", "60"]) as process:
        process.stop()
        wait_until(lambda: state(process) == "T", 2.0, "stopped")
        assert process.exit_code is None
        process.resume()
        wait_until(lambda: state(process) == "S", 2.0, "asleep again")


def test_signals_reach_the_process_and_show_in_its_exit_code() -> None:
    for send, number in ((Process.kill, signal.SIGKILL), (Process.terminate, signal.SIGTERM), (Process.interrupt, signal.SIGINT)):
        with Process(["sleep", "60"]) as process:
            send(process)
            assert process.wait(2.0) == -number


def test_closing_kills_a_stopped_process_and_its_children() -> None:
    with Process(["sh", "-c", "sleep 60 & echo $!; wait"]) as process:
        child = int(process.wait_for_line(r"^\d+$", 2.0)[0])
        process.stop()
        assert is_alive(child)
    assert not is_alive(process.pid)
    assert not is_alive(child)
    process.close()


def test_a_child_that_outlives_its_killed_parent_is_ended_by_closing() -> None:
    with Process(["sh", "-c", "sleep 60 & echo $!; wait"]) as process:
        child = int(process.wait_for_line(r"^\d+$", 2.0)[0])
        process.kill()
        process.wait(2.0)
        assert is_alive(child)
    wait_until(lambda: not is_alive(child), 2.0, "the child ended")


def test_a_command_that_takes_too_long_is_killed() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"not within 0\.05 s.*\n.*sleep 60"):
        run_command(["sleep", "60"], deadline_s=0.05)
    assert time.monotonic() - start < 5.0


def test_a_child_sees_no_option_of_ours_but_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHSERVE_MESH", "ours")
    code = "import os; print(sorted(k for k in os.environ if k.startswith('MESHSERVE_')), os.environ['PYTHONUNBUFFERED'])"
    done = run_command(python(code), env={"MESHSERVE_NAME": "given"})
    assert done.stdout == "['MESHSERVE_NAME'] 1"


def test_it_has_a_session_of_its_own() -> None:
    with Process(["sleep", "60"]) as process:
        assert os.getsid(process.pid) == process.pid
