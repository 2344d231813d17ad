"""Fixtures for all tests: hosts where they can be made, and a check that each test has cleaned up."""

import contextlib
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.harness import Lan, pressure, wait_until
from tests.harness.leaks import inventory, left_since, prepare
from tests.harness.namespaces import leave_network
from tests.harness.rights import missing_right

LEAVE_S = 2.0


def pytest_configure(config: pytest.Config) -> None:
    """Start what lasts as long as the process before any test is compared with it. Examples of laws may take as long as they take."""
    if hasattr(config, "workerinput") and missing_right() is None:
        # workers of `pytest -n` take the same ports and hear the same multicast: a loopback each
        leave_network()
    prepare()
    pressure.watch()
    settings.register_profile("dev", deadline=None)
    # CI looks at the same examples each time, so that it fails for a change and not for a draw
    settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use the fixture `lan`, and say which tests one worker of `pytest -n` runs one after the other.

    The tests of a file share what they start. Of LANs there is one at a time: two would keep each other from the cores.
    """
    for item in items:
        if "lan" in getattr(item, "fixturenames", ()):
            item.add_marker("lan")
        is_lan = item.get_closest_marker("lan") is not None
        item.add_marker(pytest.mark.xdist_group("lan" if is_lan else item.path.name))


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
