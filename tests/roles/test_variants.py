"""Two models under one name: requests go to one of them, stay with it, and clients can choose."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from meshserve.app import Peer
from meshserve.config import MeshConfig, ServeConfig
from meshserve.errors import PeerLost
from meshserve.mesh.mesh import Mesh
from meshserve.roles.frontend.shapes import models_body
from meshserve.roles.router import RouterRole
from meshserve.wire.card import ModelCard, exact_name, short
from meshserve.wire.hello import PeerInfo
from meshserve.wire.messages import GENERATE
from meshserve.wire.structs import replace
from tests.harness import run_async, until
from tests.roles.scripted import DEADLINE_S, Scene, Worker, scene

HASHES = "a" * 32, "b" * 32


@asynccontextmanager
async def joined(found: Scene, model_hash: str, worker: Worker | None = None) -> AsyncIterator[Worker]:
    """One more worker of the scene's model by name, with these weights."""
    own, worker = found.mesh.own, worker or Worker()
    assert own.card is not None and own.layout is not None
    card, layout = replace(own.card, model_hash=model_hash), replace(own.layout, fingerprint=f"dummy/{model_hash}")
    config = MeshConfig(mesh="scripted", roles=("decode",), interface="127.0.0.1", use_mdns=False, seeds=(f"127.0.0.1:{own.port}",))
    mesh = Mesh(config, card, layout)
    await mesh.start()
    mesh.serve(GENERATE, worker.on_generate)
    try:
        await mesh.join()
        await until(lambda: mesh.incarnation in {info.incarnation for info in found.mesh.peers_with("decode")}, DEADLINE_S, "they meet")
        yield worker
    finally:
        await mesh.close()


@asynccontextmanager
async def two_weights(counts: tuple[int, int], roles: tuple[str, ...]) -> AsyncIterator[tuple[Scene, list[Worker]]]:
    """A processor, with or without a router, and so many workers of each weights; those of equal weights are one worker."""
    async with AsyncExitStack() as stack:
        found = await stack.enter_async_context(scene(roles=roles))
        if "router" in roles:
            router = RouterRole(found.mesh, "round-robin")
            stack.callback(router.close)
        await found.mesh.join()
        workers = [Worker(), Worker()]
        for worker, model_hash, count in zip(workers, HASHES, counts, strict=True):
            for _ in range(count):
                await stack.enter_async_context(joined(found, model_hash, worker))
        yield found, workers


ROLES = [("processor", "frontend"), ("processor", "router")]


@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("counts", [(1, 2), (2, 1)])
def test_requests_for_the_name_go_to_the_model_of_most_workers_and_to_no_other(counts: tuple[int, int], roles: tuple[str, ...]) -> None:
    async def check() -> None:
        async with two_weights(counts, roles) as (found, workers):
            for worker in workers:
                worker.script = ("said",)
            for number in range(6):
                await found.ask(request_id=f"r{number}").end()
            chosen, other = (1, 0) if counts == (1, 2) else (0, 1)
            assert len(workers[chosen].calls) == 6 and not workers[other].calls
            await found.ask(request_id="exact", model=exact_name("dummy", HASHES[other])).end()
            assert len(workers[other].calls) == 1

    run_async(check())


@pytest.mark.parametrize("roles", ROLES)
def test_an_output_that_has_begun_never_goes_on_with_other_weights(roles: tuple[str, ...]) -> None:
    async def check() -> None:
        async with two_weights((2, 1), roles) as (found, (first, other)):
            client = found.ask(max_tokens=9)
            await first.asked(1)
            first.say(0, "ab", None)
            async with joined(found, HASHES[1], other), joined(found, HASHES[1], other):  # now the name means the other model
                assert {info.card.model_hash for info in found.mesh.peers_serving("decode", "dummy") if info.card} == {HASHES[1]}
                first.calls[0].fail(PeerLost("it died"))
                await first.asked(2)
                first.say(1, "cd", position=2)
                await client.end()
                assert "".join(client.raw) == "abcd" and not other.calls

    run_async(check())


def test_a_request_without_output_goes_to_other_weights_once_its_own_are_gone() -> None:
    async def check() -> None:
        async with two_weights((0, 1), ("processor", "router")) as (found, (first, other)):
            other.script = ("done",)
            async with joined(found, HASHES[0], first), joined(found, HASHES[0], first):
                client = found.ask()
                await first.asked(1)
            await client.end()
            assert "".join(client.raw) == "done" and len(other.calls) == 1

    run_async(check())


def info_of(number: int, model_hash: str) -> PeerInfo:
    card = ModelCard("chat", model_hash, 100, "bytes", "", aliases=("alias",))
    return PeerInfo(f"w{number}", f"w{number}", "m", ("decode",), ("127.0.0.1",), 7800, "1", card, None)


def test_models_of_one_name_are_listed_apart_where_there_are_several() -> None:
    one, two = (info_of(number, found) for number, found in enumerate(HASHES))
    ids = [entry["id"] for entry in models_body([one, one], 0)["data"]]
    assert ids == ["chat", "alias"]
    found = {entry["id"]: entry for entry in models_body([one, one, two], 0)["data"]}
    assert set(found) == {"chat", "alias", *(f"{name}#{short(each)}" for name in ("chat", "alias") for each in HASHES)}
    assert [(each["id"], each["workers"]) for each in found["chat"]["variants"]] == [("chat#aaaaaaaa", 2), ("chat#bbbbbbbb", 1)]
    assert [each["model_hash"] for each in found["chat#bbbbbbbb"]["variants"]] == [HASHES[1]]


def test_a_client_asks_for_one_of_two_models_by_its_exact_name() -> None:
    async def check() -> None:
        common: dict[str, Any] = {"mesh": "exact", "interface": "127.0.0.1", "use_mdns": False}
        served = ("chat",)
        front = Peer(
            MeshConfig(roles=("frontend", "processor", "router", "decode"), **common),
            ServeConfig(http_port=0, model="first", served_model_names=served),
        )
        await front.start()
        seeds = (f"127.0.0.1:{front.mesh.own.port}",)
        other = Peer(MeshConfig(roles=("decode",), seeds=seeds, **common), ServeConfig(model="second", served_model_names=served))
        await other.start()
        try:
            await until(lambda: len(front.mesh.peers_with("decode")) == 2, DEADLINE_S, "they meet")
            async with httpx.AsyncClient(base_url=front.http_url or "", timeout=30.0) as client:
                listed = (await client.get("/v1/models")).json()["data"]
                names = [entry["id"] for entry in listed if "#" in entry["id"]]
                assert len(names) == 2
                texts = {}
                for name in ("chat", *names):
                    body = {"model": name, "prompt": "who are you", "max_tokens": 20, "meshserve": {"receipt": True}}
                    reply = (await client.post("/v1/completions", json=body)).json()
                    texts[name] = reply["choices"][0]["text"], reply["meshserve"]["peers"]["decode"]
                assert texts[names[0]] != texts[names[1]]
                assert texts["chat"] in (texts[names[0]], texts[names[1]])
                assert {peer for _, peer in texts.values()} == {front.mesh.own.name, other.mesh.own.name}
                shown = await client.get(f"/v1/models/{names[0].replace('#', '%23')}")
                assert shown.json()["id"] == names[0]
                assert (await client.get("/v1/models/chat%2300000000")).status_code == 404
        finally:
            await other.stop()
            await front.stop()

    run_async(check())
