"""Two peers on loopback: one of every role but prefill, and a prefill peer, each with settings of its own."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx

from meshserve.app import Peer
from meshserve.config import MeshConfig, ServeConfig
from tests.harness import until

DEADLINE_S = 10.0


@asynccontextmanager
async def two_peers(mesh: str, config: ServeConfig, prefill_config: ServeConfig) -> AsyncIterator[httpx.AsyncClient]:
    """A client of both, once they have met."""
    common = MeshConfig(mesh=mesh, interface="127.0.0.1", use_mdns=False)
    peer = Peer(replace(common, roles=("frontend", "processor", "router", "decode")), config)
    await peer.start()
    seeds = (f"127.0.0.1:{peer.mesh.own.port}",)
    prefill = Peer(replace(common, roles=("prefill",), seeds=seeds), prefill_config)
    try:
        await prefill.start()
        try:
            await until(lambda: bool(peer.mesh.peers_with("prefill")), DEADLINE_S, "they have met")
            assert peer.http_url is not None
            async with httpx.AsyncClient(base_url=peer.http_url, timeout=60.0) as client:
                yield client
        finally:
            await prefill.stop()
    finally:
        await peer.stop()
