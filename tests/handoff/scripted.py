"""A prefill worker by hand, which speaks the real protocol over real sockets and does not keep to it; and the real ends to join it to."""

import random
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from meshserve.config import HandoffConfig, MeshConfig
from meshserve.engines.dummy import DummyEngine
from meshserve.engines.protocol import EngineOptions, Frame
from meshserve.errors import MeshserveError
from meshserve.handoff.blocks import checksum
from meshserve.handoff.intake import HandoffResult
from meshserve.handoff.provider import PrefillProvider
from meshserve.handoff.requester import PrefillRequester
from meshserve.kv.pool import prefix_hashes
from meshserve.mesh.calls import OutgoingCall
from meshserve.mesh.mesh import Mesh
from meshserve.mesh.transport.bulk import BulkSender
from meshserve.mesh.transport.tickets import TicketSender, receive_tickets
from meshserve.wire.generation import GenerateRequest, Sampling
from meshserve.wire.handoff import BlockMark, BulkHeader, Claim
from meshserve.wire.messages import CLAIM, STRIKE
from tests.engines.dummy_harness import GenerationRecord, PrefillRecord
from tests.harness import until

DEADLINE_S = 5.0
PROMPT = array("I", [random.Random(7).randrange(256) for _ in range(100)])
Block = tuple[int, int, bytes]
_KV_BYTES_PER_TOKEN = 64
_ENGINE = DummyEngine(EngineOptions(None, {"kv_bytes_per_token": str(_KV_BYTES_PER_TOKEN)}))
LAYOUT = _ENGINE.kv_layout
HASHES = prefix_hashes(PROMPT[:-1], LAYOUT.block_size, _ENGINE.card.model_hash)


async def new_engine(kv_bytes_per_token: int = _KV_BYTES_PER_TOKEN) -> DummyEngine:
    engine = DummyEngine(EngineOptions(None, {"kv_bytes_per_token": str(kv_bytes_per_token)}))
    await engine.start()
    return engine


async def blocks_of(tokens: "array[int]", kv_bytes_per_token: int = _KV_BYTES_PER_TOKEN) -> list[Block]:
    """The prompt's true KV."""
    engine, record = await new_engine(kv_bytes_per_token), PrefillRecord()
    engine.prefill("p", tokens, 0, record)
    await record.end()
    await engine.close()
    return [(index, record.num_tokens[index], payload) for index, payload in sorted(record.blocks.items())]


async def text_of(engine: DummyEngine, result: HandoffResult | None) -> list[int]:
    """What the engine generates from a prompt, with its KV or without."""
    record = GenerationRecord()
    engine.generate(GenerateRequest("g", "dummy", PROMPT, Sampling(max_tokens=16)), record, result.reservation if result else None)
    return await record.end()


async def undisturbed(kv_bytes_per_token: int = _KV_BYTES_PER_TOKEN) -> list[int]:
    engine = await new_engine(kv_bytes_per_token)
    tokens = await text_of(engine, None)
    await engine.close()
    return tokens


class ClaimSink:
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
        self.inlet = receive_tickets(mesh, self.tickets.append)
        self.claims: list[OutgoingCall] = []
        self.bulk = BulkSender(mesh, lambda peer, answer: self.answers.append(answer), lambda peer, reason: None)
        mesh.serve(STRIKE, lambda call: call.end())

    async def claim(self, request_id: str = "r1", body: Any = None) -> ClaimSink:
        """Claim, and wait for the answer."""
        claim = ClaimSink()
        self.claims.append(self.mesh.open(self.decode_peer, CLAIM, body or Claim(request_id), claim, 60.0))
        await until(lambda: claim.task or claim.error or claim.is_done, DEADLINE_S, "the claim is answered")
        return claim

    def give_up(self) -> None:
        """End all claims, as a prefill worker does whose engine failed."""
        for call in self.claims:
            call.cancel()

    @property
    def decode_peer(self) -> str:
        return self.mesh.peers_with("decode")[0].incarnation

    async def claim_with(self, blocks: list[Block], **says: Any) -> ClaimSink:
        """A claim that brings blocks, and its answer."""
        return await self.claim(body=Claim("r1", self.header(blocks, **says), [payload for _, _, payload in blocks]).to_wire())

    def send(self, blocks: list[Block], **says: Any) -> None:
        """Blocks with a header that says what it is told to say."""
        self.bulk.send(self.decode_peer, self.header(blocks, **says).to_wire(), [payload for _, _, payload in blocks])

    def send_pieces(self, marks: list[BlockMark], pieces: list[Frame], attempt: int) -> None:
        """Pieces of blocks, in one message."""
        label, layout, card = (self.decode_peer, self.mesh.incarnation, "r1", attempt), self.mesh.own.layout, self.mesh.own.card
        assert layout is not None and card is not None
        hashes = prefix_hashes(PROMPT[:-1], layout.block_size, card.model_hash)
        header = BulkHeader(*label, tuple(marks), 1.0, layout.fingerprint, hashes[marks[-1].index])
        self.bulk.send(self.decode_peer, header.to_wire(), pieces)

    def header(
        self,
        blocks: list[Block],
        attempt: int = 1,
        prefill_peer: str = "",
        decode_peer: str = "",
        digest: bytes = b"",
        layout: str = LAYOUT.fingerprint,
        prefix_hash: int | None = None,
    ) -> BulkHeader:
        marks = tuple(BlockMark(index, num_tokens, digest or checksum(payload)) for index, num_tokens, payload in blocks)
        label = decode_peer or self.decode_peer, prefill_peer or self.mesh.incarnation, "r1", attempt
        if prefix_hash is None:
            prefix_hash = HASHES[marks[-1].index] if marks and 0 <= marks[-1].index < len(HASHES) else 0
        return BulkHeader(*label, marks, 1.0, layout, prefix_hash)

    def close(self) -> None:
        self.bulk.close()
        self.inlet.close()


class Decode:
    """The real requester, on an engine of its own."""

    def __init__(self, mesh: Mesh, engine: DummyEngine) -> None:
        self.mesh, self.engine = mesh, engine
        self.requester = PrefillRequester(mesh, engine, HandoffConfig())
        self.sender = TicketSender(mesh)  # after the requester, whose connection for tickets must be up first
        """For tickets that the requester does not send."""
        self.results: list[HandoffResult] = []

    def start(self) -> None:
        request = GenerateRequest("r1", "dummy", PROMPT)
        candidates = self.requester.choice.candidates(request)
        self.requester.start(request, candidates, self.mesh.now_s() + 60, self.results.append, lambda name: None)

    async def result(self) -> HandoffResult:
        return await until(lambda: self.results[0] if self.results else None, DEADLINE_S, "the handoff ends")

    def count(self, name: str) -> int:
        return self.mesh.counters.snapshot().get(name, 0)

    def close(self) -> None:
        self.requester.close()
        self.sender.close()


@asynccontextmanager
async def decode_peer(kv_bytes_per_token: int = _KV_BYTES_PER_TOKEN) -> AsyncIterator[Decode]:
    """A decode worker, over loopback."""
    engine = await new_engine(kv_bytes_per_token)
    async with peer("decode", engine) as decode_mesh:
        decode = Decode(decode_mesh, engine)
        yield decode
        decode.close()
    await engine.close()


@asynccontextmanager
async def scripted_peer(decode: Decode) -> AsyncIterator[Scripted]:
    """A scripted prefill worker that the decode worker knows; it says goodbye at the end."""
    async with peer("prefill", decode.engine, (f"127.0.0.1:{decode.mesh.own.port}",)) as mesh:
        scripted = Scripted(mesh)
        await until(lambda: decode.mesh.peers_with("prefill") and mesh.peers_with("decode"), DEADLINE_S, "both meet")
        yield scripted
        scripted.close()


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Decode, Scripted]]:
    """A decode worker and a scripted prefill worker that know each other."""
    async with decode_peer() as decode, scripted_peer(decode) as scripted:
        yield decode, scripted


@asynccontextmanager
async def started_pair() -> AsyncIterator[tuple[Decode, Scripted, list[Block]]]:
    """A pair whose decode worker has begun to hand `PROMPT` over, and the right blocks of all its tokens but the last."""
    blocks = await blocks_of(PROMPT[:-1])
    async with pair() as (decode, scripted):
        decode.start()
        yield decode, scripted, blocks


@asynccontextmanager
async def peer(role: str, engine: DummyEngine, seeds: tuple[str, ...] = ()) -> AsyncIterator[Mesh]:
    config = MeshConfig(mesh="scripted", roles=(role,), interface="127.0.0.1", use_mdns=False, seeds=seeds)
    mesh = Mesh(config, engine.card, engine.kv_layout)
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


class CountingEngine(DummyEngine):
    """Knows how often it was asked to prefill."""

    num_prefills = 0

    def prefill(self, *arguments: Any) -> None:
        self.num_prefills += 1
        super().prefill(*arguments)


@asynccontextmanager
async def real_pair(engine: DummyEngine, config: HandoffConfig | None = None) -> AsyncIterator[tuple[Decode, Mesh, PrefillProvider]]:
    """The real requester and the real provider, which computes with this engine."""
    await engine.start()
    own = await new_engine()
    async with peer("decode", own) as decode_mesh:
        decode = Decode(decode_mesh, own)
        async with peer("prefill", engine, (f"127.0.0.1:{decode_mesh.own.port}",)) as prefill_mesh:
            provider = PrefillProvider(prefill_mesh, engine, config or HandoffConfig())
            await until(lambda: decode_mesh.peers_with("prefill") and prefill_mesh.peers_with("decode"), DEADLINE_S, "both meet")
            yield decode, prefill_mesh, provider
            provider.close()
        decode.close()
    await own.close()
    await engine.close()
