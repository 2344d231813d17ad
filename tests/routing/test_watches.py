"""What a router knows of a worker's blocks, over real sockets, through broken and overflowing watches."""

import random
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from meshserve.config import MeshConfig, TransportConfig
from meshserve.engines.dummy import DummyEngine
from meshserve.engines.protocol import EngineOptions
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.mesh import Mesh
from meshserve.observe.worker_report import WorkerReporter
from meshserve.roles.router import RouterRole
from tests.engines.dummy_harness import GenerationRecord, a_request
from tests.harness import run_async, until
from tests.harness.waiting import pace_async

DEADLINE_S = 10.0
AGREE_S = MeshConfig().heartbeat_interval_s + 0.1
"""One heartbeat, and generously a round trip on a busy machine."""

TIGHT = TransportConfig(credit_bytes=16_384, max_outbox_bytes=65_536)
"""So that a watcher that does not read for one turn of the event loop overflows its link."""


@dataclass
class Followed:
    """A worker with a small cache, and a router that follows it."""

    worker: Mesh
    engine: DummyEngine
    router: Mesh
    role: RouterRole
    num_asked: int = 0

    def ask(self, rng: random.Random) -> None:
        """A prompt that begins like others before it, and evicts some of theirs."""
        self.num_asked += 1
        tokens = array("I", [rng.randrange(3)] * 16 + [rng.randrange(3)] * 16 + [rng.randrange(256) for _ in range(rng.randrange(60))])
        self.engine.generate(a_request(tokens, f"r{self.num_asked}", max_tokens=rng.randrange(1, 20)), GenerationRecord())

    def break_link(self) -> None:
        """The connection over which the router watches is lost."""
        channel = self.router.links.channels.get(self.worker.incarnation)
        if channel is not None:
            self.router.links.transport.lost(channel, "by the test")

    def overflow(self) -> None:
        """More at once than the worker may keep for this router: the link is dropped, and every stream on it."""
        for call in [call for call in self.worker.calls.incoming.values() if call.peer == self.router.incarnation]:
            flood(call)

    @property
    def is_linked(self) -> bool:
        return self.router.can_take_work(self.worker.incarnation) and self.worker.can_take_work(self.router.incarnation)

    async def settle(self) -> None:
        """Until nothing changes any more: the engine is idle, and both peers can call each other."""
        await until(lambda: not self.engine.load().num_running + self.engine.load().num_waiting, DEADLINE_S, "the engine is idle")
        await until(lambda: self.is_linked, DEADLINE_S, "the link is there again")


def flood(call: IncomingCall) -> None:
    for _ in range(400):  # more than one message's worth: the first uses up the credit
        call.send(bytes(4096))


async def started(role: str, engine: DummyEngine | None, *seeds: str) -> Mesh:
    config = MeshConfig(mesh="watched", roles=(role,), interface="127.0.0.1", use_mdns=False, seeds=seeds, transport=TIGHT)
    mesh = Mesh(config, engine.card, engine.kv_layout) if engine else Mesh(config)
    await mesh.start()
    return mesh


@asynccontextmanager
async def followed() -> AsyncIterator[Followed]:
    engine = DummyEngine(EngineOptions(None, {"num_blocks": "24", "block_size": "8", "kv_bytes_per_token": "16"}))
    await engine.start()
    worker = await started("decode", engine)
    reporter = WorkerReporter(worker, engine)
    router = await started("router", None, f"127.0.0.1:{worker.own.port}")
    role = RouterRole(router, "kv")
    await worker.join()
    await router.join()
    made = Followed(worker, engine, router, role)
    try:
        await until(lambda: made.is_linked, DEADLINE_S, "both meet")
        yield made
    finally:
        role.close()
        reporter.close()
        await router.close()
        await worker.close()
        await engine.close()


async def live_through(seed: int) -> int:
    """A random history; then the index must hold what the pool holds. How often a watch began."""
    rng = random.Random(seed)
    async with followed() as pair:
        for _ in range(40):
            rng.choices((lambda: pair.ask(rng), pair.break_link, pair.overflow), (12, 1, 1))[0]()
            await pace_async(rng.choice((0.0, 0.0, 0.002, 0.03)))
        await pair.settle()
        held = set(pair.engine.watch_blocks(None))
        assert held, "the history left something to know"
        await until(lambda: pair.role.fleet.held_by(pair.worker.incarnation) == held, AGREE_S, "index and pool agree")
        return pair.worker.counters.snapshot().get("watches_opened", 0)


@pytest.mark.parametrize("seed", range(6))
def test_index_and_worker_agree_after_a_random_history_of_broken_and_overflowing_watches(seed: int) -> None:
    assert run_async(live_through(seed)) > 1


def test_a_dead_incarnations_blocks_vanish_at_once() -> None:
    async def die() -> None:
        async with followed() as pair:
            pair.ask(random.Random(1))
            await until(lambda: pair.role.fleet.held_by(pair.worker.incarnation), DEADLINE_S, "its blocks are known")
            await pair.worker.close()
            await until(lambda: pair.router.member(pair.worker.incarnation) is None, DEADLINE_S, "it is known to be gone")
            assert not pair.role.fleet.held_by(pair.worker.incarnation)

    run_async(die())
