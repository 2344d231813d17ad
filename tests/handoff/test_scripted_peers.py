"""The decode worker's side against a scripted prefill worker, which speaks the real protocol over real sockets and does not keep to it."""

import asyncio
import random
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from meshserve.config import HandoffConfig, MeshConfig
from meshserve.engines.dummy.engine import DummyEngine
from meshserve.engines.protocol import EngineOptions
from meshserve.errors import Gone, MeshserveError
from meshserve.handoff.blocks import BlockMark, BulkHeader, checksum
from meshserve.handoff.provider import PrefillProvider
from meshserve.handoff.requester import HandoffResult, PrefillRequester
from meshserve.handoff.task import TaskState
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.pipeline import Bulk, Pipeline
from meshserve.observe.worker_report import WorkerReporter
from meshserve.roles.prefill import PrefillRole
from meshserve.roles.router import RouterRole
from meshserve.routing.bookings import BOOKING_TIMEOUT_S
from meshserve.routing.candidates import Prompt
from meshserve.routing.fleet import Question
from meshserve.wire.generation import GenerateRequest, Sampling
from tests.engines.dummy_harness import GenerationRecord, PrefillRecord
from tests.harness import run_async, until

DEADLINE_S = 5.0
PROMPT = array("I", [random.Random(7).randrange(256) for _ in range(100)])
Block = tuple[int, int, bytes]


def new_engine() -> DummyEngine:
    engine = DummyEngine(EngineOptions(None, {"kv_bytes_per_token": "64"}))
    engine.start()
    return engine


async def blocks_of(tokens: "array[int]") -> list[Block]:
    """The prompt's true KV."""
    engine, record = new_engine(), PrefillRecord()
    engine.prefill("p", tokens, 0, record)
    await record.end()
    await engine.close()
    return [(index, record.num_tokens[index], payload) for index, payload in sorted(record.blocks.items())]


async def text_of(engine: DummyEngine, result: HandoffResult | None) -> list[int]:
    """What the engine generates from a prompt, with its KV or without."""
    record = GenerationRecord()
    engine.generate(GenerateRequest("g", "dummy", PROMPT, Sampling(max_tokens=16)), record, result.reservation if result else None)
    return await record.end()


async def undisturbed() -> list[int]:
    engine = new_engine()
    tokens = await text_of(engine, None)
    await engine.close()
    return tokens


class Claim:
    """The sink of a scripted claim."""

    def __init__(self) -> None:
        self.task: dict[str, Any] | None = None
        self.is_done = False
        self.error: MeshserveError | None = None

    def on_item(self, item: Any) -> None:
        self.task = item

    def on_end(self, value: Any) -> None:
        self.is_done = True

    def on_error(self, error: MeshserveError) -> None:
        self.error = error


class Scripted:
    """A prefill worker by hand."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.tickets, self.answers = mesh, list[Any](), list[Any]()
        self.pipeline = Pipeline(mesh)
        self.pipeline.receive(self.tickets.append)
        self.bulk = Bulk(mesh, lambda peer, answer: self.answers.append(answer), lambda peer, reason: None)
        mesh.serve("prefill.strike", lambda call: call.end())

    async def claim(self, request_id: str = "r1") -> Claim:
        """Claim, and wait for the answer."""
        claim = Claim()
        self.mesh.open(self.decode_peer, "prefill.claim", request_id, claim, 60.0)
        await until(lambda: claim.task or claim.error or claim.is_done, DEADLINE_S, "the claim is answered")
        return claim

    @property
    def decode_peer(self) -> str:
        return self.mesh.peers_with("decode")[0].incarnation

    def send(self, blocks: list[Block], attempt: int = 1, prefill_peer: str = "", decode_peer: str = "", digest: bytes = b"") -> None:
        """Blocks with a header that says what it is told to say."""
        marks = tuple(BlockMark(index, num_tokens, digest or checksum(payload)) for index, num_tokens, payload in blocks)
        header = BulkHeader(decode_peer or self.decode_peer, prefill_peer or self.mesh.incarnation, "r1", attempt, marks, 1.0)
        self.bulk.send(self.decode_peer, header.to_wire(), [payload for _, _, payload in blocks])

    def close(self) -> None:
        self.bulk.close()
        self.pipeline.close()


class Decode:
    """The real requester, on an engine of its own."""

    def __init__(self, mesh: Mesh, engine: DummyEngine) -> None:
        self.mesh, self.engine = mesh, engine
        self.pipeline = Pipeline(mesh)
        self.bulk = Bulk(mesh, lambda peer, answer: None, lambda peer, reason: None)
        self.requester = PrefillRequester(mesh, self.pipeline, self.bulk, engine, HandoffConfig())
        self.results: list[HandoffResult] = []

    def start(self) -> None:
        request = GenerateRequest("r1", "dummy", PROMPT)
        self.requester.start(request, self.requester.candidates(request), self.mesh.now_s() + 60, self.results.append, lambda name: None)

    async def result(self) -> HandoffResult:
        return await until(lambda: self.results[0] if self.results else None, DEADLINE_S, "the handoff ends")

    def count(self, name: str) -> int:
        return self.mesh.counters.snapshot().get(name, 0)

    def close(self) -> None:
        self.requester.close()
        self.bulk.close()
        self.pipeline.close()


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Decode, Scripted]]:
    """A decode worker and a scripted prefill worker that know each other, over loopback."""
    engine = new_engine()
    async with peer("decode", engine) as decode_mesh:
        decode = Decode(decode_mesh, engine)
        async with peer("prefill", engine, (f"127.0.0.1:{decode_mesh.own.port}",)) as prefill_mesh:
            scripted = Scripted(prefill_mesh)
            await until(lambda: decode_mesh.peers_with("prefill") and prefill_mesh.peers_with("decode"), DEADLINE_S, "both meet")
            yield decode, scripted
            scripted.close()
        decode.close()
    await engine.close()


@asynccontextmanager
async def peer(role: str, engine: DummyEngine, seeds: tuple[str, ...] = ()) -> AsyncIterator[Mesh]:
    mesh = Mesh(MeshConfig(mesh="scripted", roles=(role,), interface="127.0.0.1", use_mdns=False, seeds=seeds), engine.card)
    await mesh.start()
    await mesh.join()
    try:
        yield mesh
    finally:
        await mesh.close()


def flipped(block: Block) -> Block:
    index, num_tokens, payload = block
    return index, num_tokens, bytes([payload[0] ^ 1]) + payload[1:]


def cut_short(block: Block) -> Block:
    index, num_tokens, payload = block
    return index, num_tokens, payload[:-64]


def misplaced(block: Block) -> Block:
    return 99, block[1], block[2]


@pytest.mark.parametrize("damage", [flipped, cut_short])
@pytest.mark.parametrize("which", [0, 3, 6])
def test_row_7_a_damaged_block_is_refused_and_the_prompt_computed_again(damage: Callable[[Block], Block], which: int) -> None:
    async def run() -> None:
        blocks = await blocks_of(PROMPT[:-1])
        async with pair() as (decode, scripted):
            decode.start()
            assert (await scripted.claim()).task is not None
            scripted.send(blocks[:which])
            scripted.send([damage(blocks[which])], digest=checksum(blocks[which][2]))
            result = await decode.result()
            assert result.state is TaskState.LOCAL and result.attempts[0]["outcome"].startswith("block refused")
            assert decode.count("kv_blocks_refused") == 1
            assert await text_of(decode.engine, None) == await undisturbed()
            assert decode.engine.load().used_blocks == 0

    run_async(run())


def test_row_7_a_block_of_the_wrong_length_or_place_with_a_right_checksum_is_refused_too() -> None:
    async def run() -> None:
        blocks = await blocks_of(PROMPT[:-1])
        async with pair() as (decode, scripted):
            decode.start()
            await scripted.claim()
            scripted.send([misplaced(blocks[0])])
            scripted.send([cut_short(blocks[0])])
            result = await decode.result()
            assert result.state is TaskState.LOCAL and "block refused" in result.attempts[0]["outcome"]
            assert decode.count("kv_blocks_received") == 0

    run_async(run())


def test_row_8_of_a_thousand_blocks_of_other_attempts_and_incarnations_none_is_accepted() -> None:
    async def run() -> None:
        blocks = await blocks_of(PROMPT[:-1])
        rng = random.Random(1)
        wrong: list[dict[str, Any]] = [
            {"attempt": 0},
            {"attempt": 2},
            {"attempt": -1},
            {"prefill_peer": "f" * 16},
            {"decode_peer": "0" * 16},
        ]
        async with pair() as (decode, scripted):
            decode.start()
            await scripted.claim()
            for _ in range(1000):
                bad = rng.choice(blocks)
                scripted.send([(bad[0], bad[1], rng.randbytes(len(bad[2])))], **rng.choice(wrong))
                if rng.random() < 0.1:
                    await asyncio.sleep(0)
            await until(lambda: decode.count("kv_blocks_stale") == 1000, DEADLINE_S, "all are refused")
            assert decode.count("kv_blocks_received") == 0 and not decode.results
            scripted.send(blocks)
            result = await decode.result()
            assert result.state is TaskState.DONE and decode.count("kv_blocks_received") == len(blocks)
            assert await text_of(decode.engine, result) == await undisturbed()

    run_async(run())


def test_row_8_blocks_that_come_twice_or_after_the_end_change_nothing() -> None:
    async def run() -> None:
        blocks = await blocks_of(PROMPT[:-1])
        async with pair() as (decode, scripted):
            decode.start()
            await scripted.claim()
            scripted.send(blocks[:3])
            scripted.send(blocks[:3])
            scripted.send(blocks[3:])
            scripted.send(blocks)
            result = await decode.result()
            await until(lambda: decode.count("kv_blocks_stale") == len(blocks), DEADLINE_S, "the late ones are refused")
            assert decode.count("kv_blocks_double") == 3 and decode.count("kv_blocks_received") == len(blocks)
            assert await text_of(decode.engine, result) == await undisturbed()

    run_async(run())


def test_row_9_the_first_claim_wins_and_late_ones_are_gone() -> None:
    async def run() -> None:
        blocks = await blocks_of(PROMPT[:-1])
        async with pair() as (decode, scripted):
            decode.start()
            first, second = await scripted.claim(), await scripted.claim()
            assert first.task is not None and isinstance(second.error, Gone)
            scripted.send(blocks)
            await until(lambda: first.is_done, DEADLINE_S, "the claim ends")
            assert isinstance((await scripted.claim()).error, Gone), "after the end"
            assert isinstance((await scripted.claim("unheard of")).error, Gone)
            assert len(decode.results) == 1 and decode.results[0].state is TaskState.DONE
            assert decode.count("claims_granted") == 1

    run_async(run())


class _CountingEngine(DummyEngine):
    num_prefills = 0

    def prefill(self, *arguments: Any) -> None:
        self.num_prefills += 1
        super().prefill(*arguments)


def test_a_routers_booking_ends_when_the_prefill_worker_reports_the_ticket() -> None:
    async def run() -> None:
        engine = new_engine()
        async with peer("decode", engine) as decode_mesh:
            decode, router = Decode(decode_mesh, engine), RouterRole(decode_mesh, "kv")
            async with peer("prefill", engine, (f"127.0.0.1:{decode_mesh.own.port}",)) as prefill_mesh:
                pipeline, reporter = Pipeline(prefill_mesh), WorkerReporter(prefill_mesh, engine)
                provider = PrefillProvider(prefill_mesh, pipeline, engine, HandoffConfig())
                bulk = Bulk(prefill_mesh, provider.acknowledged, provider.bulk_lost)
                provider.use(bulk)
                PrefillRole(provider, reporter)
                await until(lambda: decode_mesh.peers_with("prefill") and prefill_mesh.peers_with("decode"), DEADLINE_S, "both meet")

                def wait_ms(request_id: str) -> float:
                    """At the prefill worker, for a prompt of 1,000 tokens that is booked there now."""
                    prompt = Prompt(1000, 16)
                    asked = Question(request_id, prompt, [decode_mesh.incarnation], [prefill_mesh.incarnation])
                    return router.fleet.choose("kv", asked, decode_mesh.now_s()).prefill[0].wait_ms

                await until(lambda: prefill_mesh.counters.snapshot().get("watches_opened"), DEADLINE_S, "the router follows it")
                assert wait_ms("r1") == 0 and wait_ms("other") > 0
                router.fleet.unbook(prefill_mesh.incarnation, "other")
                decode.start()
                await decode.result()

                def is_over() -> bool:
                    found = wait_ms("probe")
                    router.fleet.unbook(prefill_mesh.incarnation, "probe")
                    return found == 0

                await until(is_over, BOOKING_TIMEOUT_S / 2, "the booking is over before its time")
                for closing in (provider, bulk, pipeline, reporter, router):
                    closing.close()
            decode.close()
        await engine.close()

    run_async(run())


def test_row_9_the_same_ticket_ten_times_is_prefilled_once() -> None:
    async def run() -> None:
        engine, counting = new_engine(), _CountingEngine(EngineOptions(None, {"kv_bytes_per_token": "64"}))
        counting.start()
        async with peer("decode", engine) as decode_mesh:
            decode = Decode(decode_mesh, engine)
            async with peer("prefill", counting, (f"127.0.0.1:{decode_mesh.own.port}",)) as prefill_mesh:
                pipeline = Pipeline(prefill_mesh)
                provider = PrefillProvider(prefill_mesh, pipeline, counting, HandoffConfig())
                bulk = Bulk(prefill_mesh, provider.acknowledged, provider.bulk_lost)
                provider.use(bulk)
                await until(lambda: decode_mesh.peers_with("prefill") and prefill_mesh.peers_with("decode"), DEADLINE_S, "both meet")
                decode.start()
                ticket = [decode_mesh.incarnation, "r1", 1, len(PROMPT)]
                for _ in range(10):
                    decode.pipeline.push_nowait(prefill_mesh.incarnation, ticket)
                await decode.result()
                for _ in range(10):
                    decode.pipeline.push_nowait(prefill_mesh.incarnation, ticket)
                received = prefill_mesh.counters.snapshot
                await until(lambda: provider.is_idle and received().get("tickets_received", 0) >= 11, DEADLINE_S, "all tickets came")
                await until(lambda: provider.num_queued == 0, DEADLINE_S, "none is left")
                assert counting.num_prefills == 1 and decode.results[0].state is TaskState.DONE
                for closing in (provider, bulk, pipeline):
                    closing.close()
            decode.close()
        await engine.close()
        await counting.close()

    run_async(run())
