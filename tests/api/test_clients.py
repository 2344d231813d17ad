"""The official clients against one peer that holds all roles."""

from collections.abc import Iterator

import pytest

from tests.api.cases import Case
from tests.api.clients import Clients, clients_of
from tests.api.other_cases import parameters
from tests.harness import Process, meshserve_command

ALL_ROLES = ("run", "--role", "all", "--interface", "127.0.0.1", "--no-mdns", "--http", "127.0.0.1:0")


@pytest.fixture(scope="module")
def clients() -> Iterator[Clients]:
    with Process(meshserve_command(*ALL_ROLES, "--mesh", "api-clients")) as peer:
        with clients_of(peer.ready()["http"]) as made:
            yield made
        peer.terminate()
        assert peer.wait() == 0
        assert "Traceback" not in peer.stderr_text


@pytest.mark.parametrize("case", parameters())
def test_clients_see_what_they_expect(clients: Clients, case: Case) -> None:
    case(clients)
