"""Fixtures for all tests: hosts where they can be made, and a check that each test has cleaned up."""

import contextlib
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.harness import Lan, wait_until
from tests.harness.leaks import inventory, left_since, prepare
from tests.harness.rights import missing_right

LEAVE_S = 2.0


def pytest_configure() -> None:
    """Start what lasts as long as the process before any test is compared with it. Examples of laws may take as long as they take."""
    prepare()
    settings.register_profile("unhurried", settings(), deadline=None)
    settings.load_profile("unhurried")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use the fixture `lan`."""
    for item in items:
        if "lan" in getattr(item, "fixturenames", ()):
            item.add_marker("lan")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `lan` where no hosts can be made; fail them in CI, which exists to run them."""
    if item.get_closest_marker("lan") is None or (reason := missing_right()) is None:
        return
    if os.environ.get("CI"):
        pytest.fail(f"no hosts in CI: {reason}", pytrace=False)
    pytest.skip(f"no hosts: {reason}")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Fail a test that leaves a thread, child process, ZeroMQ context, connection or event loop behind for two seconds."""
    before = inventory()
    yield
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not left_since(before), LEAVE_S, "nothing is left")
    if left := left_since(before):
        pytest.fail("left behind:\n" + "\n".join(sorted(left)), pytrace=False)


@pytest.fixture
def lan() -> Iterator[Lan]:
    """Give a private LAN without hosts, removed after the test."""
    with Lan() as made:
        yield made
        assert not made.tracebacks(), made.tracebacks()[0]
