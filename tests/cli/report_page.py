"""A report of `meshserve bench` in a real browser: that its plots are drawn, and that it needs nothing else."""

import re
from pathlib import Path

import pytest

from tests.harness.browser import CHROMIUM, Page

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: Debian's package of that name")


def open_report(browser: Page, path: Path) -> None:
    """Shows the report, complete: without an error, and without a question to the network."""
    browser.errors.clear()
    browser.addresses.clear()
    browser.open(path.as_uri())
    is_there = f"location.href === '{path.as_uri()}' && document.readyState === 'complete'"
    browser.wait_for(is_there, 20.0)
    assert browser.errors == [] and set(browser.addresses) == {path.as_uri()}


def check_report(browser: Page | None, path: Path, num_plots: int) -> None:
    """The report needs no other file, and draws so many plots, each coordinate of which is a number."""
    text = path.read_text()
    figures = text.partition('<script id="figures"')[2].partition("</script>")[0]
    assert figures and "NaN" not in figures
    assert not re.search(r"<link|src=|url\(|@import", text) and "nan" not in text
    if browser is not None:
        open_report(browser, path)
        assert browser.evaluate("document.querySelectorAll('figure > svg').length") == num_plots
        drawn = browser.evaluate("document.getElementById('plots').innerHTML")
        assert not re.search("NaN|Infinity|undefined|null", drawn)
