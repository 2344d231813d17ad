"""The demo, as a user starts it."""

import os
import re
import signal
import socket
import time
from contextlib import aclosing

import httpx
import pytest

from meshserve.cli.demo.asking import Client
from meshserve.cli.demo.prompts import dummy_questions
from tests.cli.bench_server import serving, tokens
from tests.harness import Completed, Process, run_async, run_command
from tests.harness.pressure import allowance_s
from tests.harness.processes import meshserve_command
from tests.harness.rights import missing_right

PROMPTS = 5
DEMO_ONCE = meshserve_command("demo", "--once", "--http", "127.0.0.1:0")


def demo(*options: str, prefix: tuple[str, ...] = ()) -> Completed:
    return run_command([*prefix, *meshserve_command("demo", "--once", *options)], 15.0)


def test_demo_once_answers_every_prompt_over_every_path() -> None:
    began = time.monotonic()
    done = demo("--http", "127.0.0.1:0")
    assert done.exit_code == 0, done
    assert f"{PROMPTS} of {PROMPTS} prompts answered" in done.stdout and not done.stderr
    assert "\x1b" not in done.stdout
    started = re.search(r"serve after ([\d.]+) s", done.stdout)
    assert started and float(started[1]) <= 4.0 + allowance_s(began)
    assert "<- prefill-1" in done.stdout and "prefilled locally" in done.stdout and "tokens cached" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"\d  decode-", line)]
    assert [row[2] for row in rows] == ["itself", "prefill-1", "itself", "prefill-1", "itself"]


def test_demo_without_prefill_workers_is_the_aggregated_deployment() -> None:
    done = demo("--http", "127.0.0.1:0", "--prefill", "0", "--decode", "1")
    assert done.exit_code == 0 and "<- prefill" not in done.stdout


def test_demo_serves_a_model_of_another_name() -> None:
    done = demo("--http", "127.0.0.1:0", "--prefill", "0", "--decode", "1", "--model", "other")
    assert done.exit_code == 0 and f"{PROMPTS} of {PROMPTS} prompts answered" in done.stdout, done


def test_a_demo_on_the_lan_passes_options_of_the_network_on_to_its_peers() -> None:
    done = demo("--lan", "--interface", "127.0.0.1", "--no-mdns", "--http", "127.0.0.1:0")
    assert done.exit_code == 0 and f"{PROMPTS} of {PROMPTS} prompts answered" in done.stdout, done


def test_demo_on_a_taken_port_says_so_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = demo("--http", f"127.0.0.1:{taken.getsockname()[1]}")
    assert done.exit_code == 1 and "taken" in done.stderr and len(done.stderr.splitlines()) == 1


def test_demo_runs_on_a_machine_without_any_network() -> None:
    if missing_right() is not None and not os.environ.get("CI"):
        pytest.skip("no right to make a network namespace")
    began = time.monotonic()
    done = demo(prefix=("unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"))
    assert done.exit_code == 0, done
    assert f"{PROMPTS} of {PROMPTS} prompts answered" in done.stdout
    assert time.monotonic() - began < 15.0 + allowance_s(began)


def test_a_demo_that_goes_on_says_how_to_watch_it_and_that_works() -> None:
    with Process(meshserve_command("demo", "--http", "127.0.0.1:0", "--decode", "1")) as process:
        process.wait_for_line("Ctrl-C ends it", 15.0)
        url = re.search(r"^  (http://127.0.0.1:\d+/)$", process.stdout_text, re.MULTILINE)
        assert url and httpx.get(url[1]).headers["content-type"].startswith("text/html")
        told = re.search(r"^  meshserve (trace --last --mesh .*)$", process.stdout_text, re.MULTILINE)
        assert told
        shown = run_command(meshserve_command(*told[1].split()), 10.0)
        assert shown.exit_code == 0 and "DECODE CANDIDATES" in shown.stdout
        process.interrupt()
        assert process.wait() == 0


def test_a_demo_whose_reader_has_seen_enough_ends_well() -> None:
    with Process(["sh", "-c", '{ "$@"; echo "ended with $?" >&2; } | head -1', "sh", *DEMO_ONCE]) as process:
        assert process.wait() == 0
        assert "ended with 0" in process.stderr_text and "Traceback" not in process.stderr_text


@pytest.mark.parametrize("num_shown", [0, 1, 4])
def test_a_terminal_that_is_closed_while_an_answer_is_shown_is_no_fault_of_the_answer(num_shown: int) -> None:
    shown: list[str] = []

    def show(text: str) -> None:
        if len(shown) == num_shown:
            raise BrokenPipeError
        shown.append(text)

    async def course() -> None:
        async with serving(lambda asked: tokens(8, gap_s=0.01)) as server, aclosing(Client(server.url)) as client:
            with pytest.raises(BrokenPipeError):
                await client.ask(dummy_questions()[0], "scripted", 10.0, show)

    run_async(course())
    assert len(shown) == num_shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_demo_that_is_interrupted_or_whose_terminal_is_closed_takes_its_peers_with_it(number: signal.Signals) -> None:
    with Process(meshserve_command("demo", "--http", "127.0.0.1:0")) as process:
        process.wait_for_line("Ctrl-C ends it", 15.0)
        os.kill(process.pid, number)
        assert process.wait() == 0
        assert "Traceback" not in process.stderr_text


@pytest.fixture
def real_model() -> str:
    """A path to SmolLM2, where one is named; else what fetches it."""
    pytest.importorskip("xllamacpp", reason="the library of real models is not here")
    return os.environ.get("MESHSERVE_TEST_GGUF", "smollm2")


@pytest.mark.full  # without a path it fetches 93 MB
@pytest.mark.timeout(600)
def test_demo_of_a_real_model_answers_sensibly_over_every_path(real_model: str) -> None:
    done = run_command(meshserve_command("demo", "--once", "--http", "127.0.0.1:0", "--model", real_model), 500.0)
    assert done.exit_code == 0, done
    assert f"{PROMPTS} of {PROMPTS} prompts answered" in done.stdout and "3 workers load" in done.stdout
    for words in ("The capital of France is Paris.", "a basket of apples", "called Gull Island", "light energy into chemical energy"):
        assert words in done.stdout, done
    assert re.search(r'\{"colors": ?\["\w+", ?"\w+", ?"\w+"\]\}', done.stdout)
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"\d  decode-", line)]
    assert [row[2] for row in rows] == ["itself", "prefill-1", "itself", "itself", "itself"]
    assert int(rows[2][4]) >= 256, "the text was cached"
    assert re.search(r"<- prefill-1  5 KV blocks, 3\.\d\d MB", done.stdout)
