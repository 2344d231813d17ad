"""`meshserve bench`, as a user types it, on a real mesh."""

import csv
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from meshserve.cli.main import main
from tests.cli.report_page import check_report
from tests.harness import Completed, Process, meshserve_command, run_command, wait_until
from tests.harness.browser import Page

ALONE = ("--interface", "127.0.0.1", "--no-mdns", "--mesh", "bench-tests")
SHORT = ("--prompt-tokens", "32", "--output-tokens", "4", "--warmup", "5")


@pytest.fixture(scope="module")
def mesh() -> Iterator[dict[str, str]]:
    """A peer with all roles: where it answers HTTP, and where it can be joined."""
    with Process(meshserve_command("run", "--role", "all", "--http", "127.0.0.1:0", *ALONE)) as process:
        yield process.ready()


def bench(*arguments: str) -> Completed:
    return run_command(meshserve_command("bench", *arguments), 30.0)


def figures(*arguments: str) -> dict[str, Any]:
    done = bench(*arguments, "--json")
    assert done.exit_code == 0 and not done.stderr, done
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_url_is_measured_and_its_model_found(mesh: dict[str, str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    found = figures(mesh["http"], *SHORT, "--requests", "40", "--concurrency", "4", "--csv", str(rows), "--target-ttft-ms", "5000")
    run = found["runs"][0]
    assert found["schema"] == 1 and run["model"] == "dummy" and run["load"] == "4 clients"
    assert run["requests"] == 40 and not run["errors"] and run["output_tokens"] == 160 and run["prompt_tokens"] == 40 * 32
    assert run["ttft_ms"]["count"] == run["e2e_ms"]["count"] == 40 and run["itl_ms"]["count"] == 120 and run["good_share"] == 1
    assert run["receipts"] >= 4 and {"decode", "http"} <= run["phases_ms"].keys()
    with rows.open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 40 and all(float(line["ttft_ms"]) > 0 and line["output_tokens"] == "4" for line in lines)
    assert {line["run"] for line in lines} == {"run"}


def test_the_mesh_itself_is_measured_without_http(mesh: dict[str, str]) -> None:
    peer = mesh["address"].removeprefix("tcp://")
    run = figures(*ALONE, "--peer", peer, *SHORT, "--rate", "100", "--duration", "0.5", "--endpoint", "chat")["runs"][0]
    assert run["requests"] > 20 and not run["errors"] and run["phases_ms"]["http"] == 0 and run["target"] == "mesh bench-tests"


def test_two_settings_take_turns_and_their_ratio_has_an_interval(mesh: dict[str, str], browser: Page | None, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    sides = (f"{mesh['http']} output-tokens=2", f"{mesh['http']} output-tokens=16 endpoint=chat")
    done = bench("--compare", *sides, "--pairs", "6", "--duration", "0.2", *SHORT, "--report", str(report))
    assert done.exit_code == 0, done
    assert (
        "95 % interval" in done.stdout
        and "B / A" in done.stdout
        and re.search(r"requests/s +[\d.,]+ +[\d.,]+ +[\d.]+ +[\d.]+ to [\d.]+ ", done.stdout)
    )
    check_report(browser, report, 5)


def test_a_sweep_names_a_knee_and_its_rule(mesh: dict[str, str], browser: Page | None, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    done = bench(mesh["http"], "--sweep", "concurrency=1,2,4", "--duration", "0.3", *SHORT, "--report", str(report))
    assert done.exit_code == 0 and "Kleinrock" in done.stdout and "concurrency 4" in done.stdout, done
    check_report(browser, report, 4)


def num_answered(mesh: dict[str, str]) -> float:
    """By the mesh, since its start."""
    with urllib.request.urlopen(f"{mesh['http']}/metrics", timeout=60.0) as response:
        found = re.search(r"^meshserve_requests_done_total\{.*\} (\S+)$", response.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "interrupted after"),
        (("--sweep", "rate=50,100"), "interrupted: 1 of 2 steps are shown"),
        (("--compare",), "interrupted after 0 of 10 pairs"),
    ],
)
def test_ctrl_c_shows_what_was_seen_until_then(mesh: dict[str, str], tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    report, rows = tmp_path / "report.html", tmp_path / "rows.csv"
    targets = (*arguments, mesh["http"], mesh["http"]) if "--compare" in arguments else (mesh["http"], *arguments)
    command = ["bench", *targets, *SHORT, "--warmup", "0", "--duration", "60", "--report", str(report), "--csv", str(rows)]
    before = num_answered(mesh)
    with Process(meshserve_command(*command)) as process:
        wait_until(lambda: num_answered(mesh) >= before + 30, 20.0, "requests were answered")
        process.interrupt()
        assert process.wait() == 130, process.stderr_text
        assert words in process.stdout_text and not process.stderr_text
    assert words in report.read_text() and len(rows.read_text().splitlines()) > 20


def test_ctrl_c_before_anything_was_measured_says_so(mesh: dict[str, str]) -> None:
    before = num_answered(mesh)
    with Process(meshserve_command("bench", mesh["http"], *SHORT, "--warmup", "60s")) as process:
        wait_until(lambda: num_answered(mesh) >= before + 5, 20.0, "requests were answered")
        process.interrupt()
        assert process.wait() == 130 and "nothing was measured" in process.stdout_text and "ms  " not in process.stdout_text


def test_the_key_of_one_side_is_shown_nowhere(mesh: dict[str, str], tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    sides = (f"{mesh['http']} api-key=secret", f"{mesh['http']} api-key='secret too'")
    done = bench("--compare", *sides, "--pairs", "6", "--duration", "0.1", *SHORT, "--report", str(report))
    assert done.exit_code == 0 and "api-key=..." in done.stdout and "secret" not in done.stdout + report.read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_figures_are_printed_even_where_a_file_cannot_be_written(mesh: dict[str, str]) -> None:
    done = bench(mesh["http"], *SHORT, "--requests", "5", "--csv", "/dev/full")
    assert done.exit_code == 1 and "time to first token" in done.stdout and "cannot be written" in done.stderr


def test_a_run_prints_a_table_and_writes_a_report(mesh: dict[str, str], browser: Page | None, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    done = bench(mesh["http"], *SHORT, "--duration", "0.3", "--report", str(report), "--api-key", "secret")
    assert done.exit_code == 0 and "time to first token" in done.stdout and "p99.9" in done.stdout and "\x1b" not in done.stdout
    check_report(browser, report, 4)
    assert "secret" not in report.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rate", "5", "--concurrency", "2"), "--concurrency and --rate"),
        (("http://x", "--prompt-tokens", "some"), "no distribution of lengths"),
        (("localhost:8000",), "is no URL of a server"),
        (("http://x", "--warmup", "long"), "--warmup"),
        (("http://x", "--ramp", "rate=1"), "--ramp"),
        (("http://x", "--sweep", "rate=5"), "--sweep"),
        (("http://x", "--sweep", "rate=5,6", "--concurrency", "2"), "--sweep says what the load is: without --concurrency"),
        (("http://x", "--extra", "[1]"), "--extra is not a JSON object"),
        (("http://x", "--report", "/nowhere/at/all.html"), "there is no directory '/nowhere/at'"),
        (("http://x", "--csv", "/nowhere.at/all.csv"), "there is no directory"),
        (("http://x", "--trace", "/nowhere"), "cannot be read"),
        (("http://x", "--trace", "/nowhere", "--turns", "2"), "without --turns"),
        (("http://x", "--compare", "http://a", "http://b"), "without URL"),
        (("--compare", "http://a", "banana"), "'banana' is neither a URL"),
        (("--compare", "http://a", "report=x"), "'report' is no option that two sides can differ in"),
        (("--compare", "http://a", "http://b concurrency=none"), "not a valid integer"),
    ],
)
def test_a_usage_error_is_one_line_and_exits_with_two(arguments: tuple[str, ...], words: str) -> None:
    done = CliRunner().invoke(main, ["bench", *arguments])
    assert done.exit_code == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.output


def test_options_are_shown_in_groups() -> None:
    done = CliRunner().invoke(main, ["bench", "--help"])
    headings = re.findall(r"^([A-Z][^:\n]*):$", done.output, re.MULTILINE)
    assert headings == ["Target", "Load", "Prompts and answers", "What to find out", "Output", "The mesh, where no URL is given", "Other"]


def test_a_target_that_answers_nothing_right_ends_in_exit_code_one(mesh: dict[str, str], browser: Page | None, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    done = bench(mesh["http"], *SHORT, "--model", "other", "--requests", "3", "--report", str(report))
    assert done.exit_code == 1 and "HTTP 404 model_not_found" in done.stdout and "Traceback" not in done.stderr
    assert "p99.9" not in done.stdout  # a table of nothing
    check_report(browser, report, 0)


def test_a_comparison_with_one_that_answers_nothing_says_so_and_ends_in_exit_code_one(
    mesh: dict[str, str], browser: Page | None, tmp_path: Path
) -> None:
    report = tmp_path / "report.html"
    command = (
        "--compare",
        mesh["http"],
        f"{mesh['http']} model=other",
        "--pairs",
        "6",
        "--duration",
        "0.1",
        *SHORT,
        "--report",
        str(report),
    )
    done = bench(*command)
    assert done.exit_code == 1 and "A has it in 6 turns and B in 0: requests/s" in done.stdout and "HTTP 404 model_not_found" in done.stdout
    assert "Nothing to compare" in report.read_text()
    check_report(browser, report, 4)


def a_trace(path: Path, *lengths: tuple[int, int]) -> Path:
    """Requests of so many tokens of prompt and output, none of which shares a block."""
    with path.open("w") as file:
        for number, (prompt, output) in enumerate(lengths):
            hash_ids = [number * 100 + block for block in range(-(-prompt // 512))]
            line = {"timestamp": 5 * number, "input_length": prompt, "output_length": output, "hash_ids": hash_ids}
            file.write(json.dumps(line) + "\n")
    return path


def test_a_trace_is_played_with_the_lengths_that_it_states(mesh: dict[str, str], tmp_path: Path) -> None:
    trace = a_trace(tmp_path / "trace.jsonl", (700, 9), (40, 3), (512, 20))
    found = figures(mesh["http"], "--trace", str(trace), "--warmup", "0")
    run = found["runs"][0]
    assert run["requests"] == 3 and run["prompt_tokens"] == 700 + 40 + 512 and run["output_tokens"] == 9 + 3 + 20
    assert not any("lengths are not" in note for note in found["notes"])


def test_a_trace_that_ends_within_the_warmup_says_so(mesh: dict[str, str], tmp_path: Path) -> None:
    trace = a_trace(tmp_path / "trace.jsonl", (40, 3), (40, 3))
    done = bench(mesh["http"], "--trace", str(trace), "--json")
    words = "the trace is shorter than the warm-up (1 s): nothing was measured of 2 requests; --warmup 0"
    assert done.exit_code == 1 and words in json.loads(done.stdout)["notes"][0]
    shown = bench(mesh["http"], "--trace", str(trace), "--warmup", "5").stdout
    assert "shorter than the warm-up (5 requests)" in re.sub(r"\s+", " ", shown)


def test_a_trace_that_cannot_be_played_is_a_usage_error_with_its_line(tmp_path: Path) -> None:
    trace = a_trace(tmp_path / "trace.jsonl", (40, 3), (40, 0))
    done = bench("http://127.0.0.1:9", "--trace", str(trace))
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "line 2 is not a request of a trace: output_length is 0" in done.stderr
