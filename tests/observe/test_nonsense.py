"""A worker that reports nonsense: `/mesh/peers` and `/metrics` go on, and so does the routing."""

import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from meshserve.app import Peer
from meshserve.config import MeshConfig, ServeConfig
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.mesh import Mesh
from meshserve.routing.fleet import Fleet
from meshserve.wire.generation import GenerateRequest
from meshserve.wire.messages import GENERATE, STATUS, WORKER_LOADS, WORKER_REPORTS
from meshserve.wire.routing import WorkerLoad, WorkerReport
from tests.harness import run_async, until

DEADLINE_S = 5.0
NAN, INFINITY = math.nan, math.inf
LOAD = WorkerLoad(max_running=8, num_blocks=64).to_wire()


def load_with(place: int, figure: Any) -> list[Any]:
    return [*LOAD[:place], figure, *LOAD[place + 1 :]]


class Nonsense:
    """A decode worker that is played by hand: it answers what it is told to, and takes every sequence to an end of one token."""

    def __init__(self, mesh: Mesh, status: Any, reports: list[Any], loads: list[Any]) -> None:
        self.reports, self.loads, self.num_asked = reports, loads, 0
        mesh.serve(STATUS, lambda call: call.end(status))
        mesh.serve(WORKER_REPORTS, lambda call: self._say(call, self.reports))
        mesh.serve(WORKER_LOADS, lambda call: self._say(call, self.loads))
        mesh.serve(GENERATE, self._on_generate)

    def _say(self, call: IncomingCall, items: list[Any]) -> None:
        for item in items:
            call.send(item)

    def _on_generate(self, call: IncomingCall) -> None:
        request: GenerateRequest = call.body
        self.num_asked += 1
        call.send([request.num_generated, 65])
        call.end({"reason": "stop", "num_tokens": request.num_generated + 1})


@asynccontextmanager
async def met(status: Any, reports: list[Any], loads: list[Any]) -> AsyncIterator[tuple[Peer, Nonsense, httpx.AsyncClient]]:
    """A peer of all roles that knows such a worker."""
    common: dict[str, Any] = {"mesh": "nonsense", "interface": "127.0.0.1", "use_mdns": False}
    roles = ("frontend", "processor", "router", "decode")
    peer = Peer(MeshConfig(roles=roles, **common), ServeConfig(http_port=0, policy="round-robin"))
    await peer.start()
    own = peer.mesh.own
    mesh = Mesh(MeshConfig(roles=("decode",), seeds=(f"127.0.0.1:{own.port}",), **common), own.card, own.layout)
    await mesh.start()
    worker = Nonsense(mesh, status, reports, loads)
    try:
        await mesh.join()
        await until(lambda: len(peer.mesh.peers_with("decode")) == 2, DEADLINE_S, "both meet")
        async with httpx.AsyncClient(base_url=peer.http_url or "", timeout=30.0) as client:
            yield peer, worker, client
    finally:
        await mesh.close()
        await peer.stop()


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


async def check_it_goes_on(worker: Nonsense, client: httpx.AsyncClient) -> None:
    """Requests are answered, by that worker too, and what people look at is well-formed."""
    for number in range(4):
        reply = await client.post("/v1/completions", json={"prompt": f"{number}", "model": "dummy", "max_tokens": 2})
        assert reply.status_code == 200, reply.text
    assert worker.num_asked, "it is still asked"
    reply = await client.get("/mesh/peers")
    assert reply.status_code == 200 and len(json.loads(reply.text, parse_constant=refuse)) == 2
    reply = await client.get("/metrics")
    assert reply.status_code == 200 and "NaN" not in reply.text
    assert list(text_string_to_metric_families(reply.text))
    reply = await client.get("/ready")
    assert reply.status_code == 200


@pytest.mark.parametrize(
    "status",
    [
        {"up_s": NAN},
        {"up_s": -INFINITY},
        {"up_s": 1.0, "load": {"num_running": NAN}},
        {"up_s": 1.0, "refused": [{"who": "x", "reason": "y", "times": 1, "ago_s": NAN}]},
        {"up_s": 1.0, "silent": [{"incarnation": "x", "name": "x", "roles": [], "address": "", "ago_s": INFINITY}]},
        {"up_s": 1.0, "histograms": {"ttft": [NAN, [0] * 16]}},
        {"up_s": 1.0, "counters": {"tokens_generated": -5, "a b\n": 1, "x" * 5000: 1}},
        {"up_s": 1.0, "held": {"requests": -(2**63)}},
        {"up_s": 1.0, "counters": {"tokens_generated": 2**64 - 1}},
        [NAN],
        None,
    ],
)
def test_a_status_of_nonsense_is_left_out_of_what_people_look_at(status: Any) -> None:
    async def check() -> None:
        async with met(status, [], []) as (_, worker, client):
            await check_it_goes_on(worker, client)

    run_async(check())


@pytest.mark.parametrize(
    ("report", "is_readable"),
    [
        ([load_with(0, NAN)], False),
        ([load_with(3, INFINITY)], False),
        ([load_with(7, -1)], False),
        ([load_with(9, 0.5)], False),
        ({"load": LOAD}, False),
        ([LOAD, ["a", None]], False),
        ([LOAD, [NAN]], False),
        (NAN, False),
        ([LOAD, [-1, 0, 2**63, 2**64 - 1], [-7], ["nobody"], ["nobody"]], True),
        ([load_with(12, 2**39)], True),
    ],
)
def test_a_report_of_nonsense_is_counted_and_costs_no_request(report: Any, is_readable: bool) -> None:
    async def check() -> None:
        async with met({"up_s": 1.0}, [report, report], [report[0] if isinstance(report, list) else report]) as (peer, worker, client):
            await check_it_goes_on(worker, client)
            counters = peer.mesh.counters.snapshot()
            assert (counters.get("faults_report", 0) > 0) is not is_readable
            assert counters.get("faults_report", 0) == counters.get("reports_malformed", 0)

    run_async(check())


def test_a_worker_that_says_it_holds_more_blocks_than_it_has_is_not_believed() -> None:
    fleet, load = Fleet(), WorkerLoad(num_blocks=4)
    fleet.join("w", "w")
    assert fleet.report("w", WorkerReport(load, (1, 2, 3, 4)), 0.0)
    assert fleet.held_by("w") == {1, 2, 3, 4}
    assert not fleet.report("w", WorkerReport(load, tuple(range(100))), 0.0)
    assert not fleet.held_by("w")


def test_a_mean_of_outputs_that_no_worker_can_have_had_counts_as_the_longest() -> None:
    fleet = Fleet()
    fleet.join("w", "w")
    fleet.report("w", WorkerReport(WorkerLoad(mean_output_tokens=2**39)), 0.0)
    assert fleet.forecast.mean_output_tokens < 10_000
