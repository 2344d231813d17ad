"""What tests of several commands share."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from tests.harness.browser import CHROMIUM, Page, open_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Page | None]:
    """None where there is no browser."""
    with open_browser() if CHROMIUM is not None else nullcontext() as page:
        yield page
