"""The report of a benchmark: scales with round numbers, and lines that can be told apart."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshserve.observe.dashboard
from meshserve.cli.bench.outcome import Outcome
from meshserve.cli.bench.report import report
from meshserve.cli.bench.sweep import find_knee
from tests.cli.report_page import check_report, needs_chromium, open_report
from tests.cli.test_bench_parts import record, step, tally_of
from tests.cli.test_bench_shown import run_of
from tests.harness.browser import Page

SCRIPT = Path(meshserve.observe.dashboard.__file__).with_name("plot.js")


@pytest.fixture(scope="module")
def page(browser: Page) -> Page:
    """A page with the functions of plot.js as `plot`."""
    source = json.dumps(SCRIPT.read_text())
    loading = f"import('data:text/javascript,' + encodeURIComponent({source}))"
    browser.evaluate(f"{loading}.then((module) => {{ window.plot = module; }})")
    return browser


def ticks(page: Page, low: float, high: float, is_log: bool = False) -> list[float]:
    found: list[float] = page.evaluate(f"new plot.Scale({low}, {high}, '', {json.dumps(is_log)}).ticks()")
    return found


@needs_chromium
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_lie_within_their_axis_and_are_neither_few_nor_many(page: Page, low: float, width: float) -> None:
    found = ticks(page, low, low + width)
    assert 2 <= len(found) <= 11 and found == sorted(found)
    assert low - width * 1e-6 <= found[0] and found[-1] <= low + width * (1 + 1e-6)


@needs_chromium
@given(st.floats(1e-4, 1e4), st.floats(1.5, 1e7))
def test_ticks_of_a_logarithmic_axis_lie_within_it(page: Page, low: float, factor: float) -> None:
    found = ticks(page, low, low * factor, is_log=True)
    assert 2 <= len(found) <= 12 and low * 0.998 <= found[0] and found[-1] <= low * factor * 1.002


def is_plotted(value: float) -> bool:
    return not math.isfinite(value) or (abs(value) < 1e12 and (abs(value) > 1e-6 or value == 0))


@needs_chromium
@given(st.lists(st.floats().filter(is_plotted), max_size=5), st.booleans(), st.booleans())
def test_an_axis_has_room_for_whatever_comes(page: Page, values: list[float], is_log: bool, is_from_zero: bool) -> None:
    options = json.dumps({"isLog": is_log, "isFromZero": is_from_zero})
    scale = f"const values = {json.dumps(values)}; const scale = plot.Scale.around(values, 'ms', {options});"
    found: dict[str, Any] = page.evaluate(
        f"(() => {{ {scale} return {{ ...scale, ticks: scale.ticks(), places: values.map((value) => scale.place(value)) }}; }})()"
    )
    assert found["low"] < found["high"] and found["ticks"]
    for value, place in zip(values, found["places"], strict=True):
        if math.isfinite(value) and (value > 0 or not is_log):
            assert 0 <= place <= 1


@needs_chromium
def test_a_line_is_interrupted_where_a_point_is_missing(page: Page) -> None:
    parts = page.evaluate("plot.stretches([[0, null], [1, 1], [2, 2.04], [3, NaN], [4, 4], [null, 5]])")
    assert parts == [[[1, 1], [2, 2.04]], [[4, 4]]]
    assert page.evaluate("plot.pathOf([[1, 1], [2, 2.04]])") == "M1 1L2 2" and page.evaluate("plot.pathOf([[4, 4]])") == "M4 4h0"
    assert page.evaluate("plot.pathOf([[1, 1], [2, 3]], true)") == "M1 1H2V3"


def write_sweep(path: Path, num_steps: int) -> None:
    """The report of a sweep whose label tries to end the script."""
    runs = [run_of(f"</script> {number}", step(10 + number, 0.1)) for number in range(num_steps)]
    outcome = Outcome("sweep", runs, [], knee=find_knee([run.tally for run in runs]))
    path.write_text(report(outcome, "meshserve bench <b>"))


@needs_chromium
def test_lines_of_a_long_sweep_differ(browser: Page, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_sweep(path, 12)
    open_report(browser, path)
    lines = "[...document.querySelectorAll('figure:nth-child(2) .line')].map((line) => line.getAttribute('class'))"
    assert len(set(browser.evaluate(lines))) == 12
    assert browser.evaluate("document.querySelector('h1 + p code').textContent") == "meshserve bench <b>"


@needs_chromium
@pytest.mark.parametrize(("error", "num_plots"), [(None, 4), ("timeout", 0)])
def test_a_run_of_one_answer_or_none_is_plotted_as_far_as_it_goes(
    browser: Page, tmp_path: Path, error: str | None, num_plots: int
) -> None:
    run = run_of("run", tally_of([record(0.0, [0.5], error)], duration_s=None))
    (tmp_path / "report.html").write_text(report(Outcome("run", [run], []), "meshserve bench"))
    check_report(browser, tmp_path / "report.html", num_plots)


def test_a_reader_of_the_file_finds_the_fields_of_json(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_sweep(path, 3)
    figures = path.read_text().partition('<script id="figures" type="application/json">')[2]
    found = json.loads(figures.partition("</script>")[0])
    assert found["kind"] == "sweep" and [run["label"] for run in found["runs"]] == [f"</script> {number}" for number in range(3)]
