"""The official clients against the four topologies: each sees what it expects, and the same in all of them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.api.cases import Case
from tests.api.full_cases import parameters
from tests.api.topologies import Topology, all_topologies
from tests.harness.records import Record


@pytest.fixture(scope="module")
def topologies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Topology]]:
    with all_topologies(tmp_path_factory.mktemp("topologies")) as started:
        yield started


@pytest.mark.parametrize("case", parameters())
def test_clients_see_what_they_expect_and_the_same_in_every_topology(topologies: list[Topology], case: Case) -> None:
    with ThreadPoolExecutor(len(topologies)) as pool:
        outcomes = list(pool.map(lambda topology: case(topology.clients), topologies))
    for topology, outcome in zip(topologies[1:], outcomes[1:], strict=True):
        assert outcome == outcomes[0], f"{topology.name} differs from {topologies[0].name}"


def test_every_prompt_of_these_cases_was_prefilled_where_the_topology_says(topologies: list[Topology]) -> None:
    for topology in topologies:
        record = Record(topology.record)
        record.check()
        assert num_prefilled_here(record) if not topology.hands_all_over else not num_prefilled_here(record)


def num_prefilled_here(record: Record) -> int:
    """Requests that a decode worker took, with something to compute before the last token, and that were not handed over."""
    handed_over = {event.request for event in record.of("handoff_ended") if event.details["state"] in ("done", "cancelled")}
    lengths = {event.request: event.details["num_tokens"] for event in record.of("submit")}
    cached = {event.request: event.details["num_cached_tokens"] for event in record.of("result")}
    taken = {event.request for event in record.of("accepted")}
    return sum(lengths[request] - 1 > cached[request] for request in taken - handed_over)
