"""How a peer looks for others: at the addresses that it was told, and by mDNS; again and again while nobody is found."""

import asyncio
import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from meshserve.config import FIRST_PORT, MeshConfig
from meshserve.mesh.network import parse_host_port, resolve
from meshserve.mesh.tasks import TaskOwner
from meshserve.wire.hello import PeerHint, PeerInfo

if TYPE_CHECKING:
    from meshserve.mesh.discovery import MdnsDiscovery

_log = logging.getLogger(__name__)

_MAX_SEED_ADDRESSES = 4
_PAUSES_S = (2.0, 4.0, 8.0)


class Search:
    """Finds addresses; who is there is for a hello to tell."""

    def __init__(
        self, config: MeshConfig, on_seed: Callable[[str, int], None], on_announced: Callable[[str, PeerHint], None], now_s: float
    ) -> None:
        """`on_seed` gets each address of a `--peer`, `on_announced` what mDNS tells, with the mesh that it tells it of."""
        self._config, self._on_seed, self._on_announced = config, on_seed, on_announced
        self.mdns = "off"
        """For people: `on`, or why not."""
        self._discovery: MdnsDiscovery | None = None
        self._is_discovering = False
        self._unknown: set[str] = set()
        """Hosts of `--peer` that have no address, of which was warned."""
        self._tasks = TaskOwner()
        self._next_s, self._num_before = now_s, 0

    def is_due(self, now_s: float) -> bool:
        """Whether a peer that is still alone should ask again. Answers get lost, and networks come late."""
        return now_s >= self._next_s

    def start_over(self) -> None:
        """The network is another one: what was asked before counts for nothing."""
        self._num_before = 0

    async def ask(self, own: PeerInfo, interfaces: tuple[str, ...], now_s: float) -> None:
        """Ask who is there, now; `interfaces` are the addresses of those where mDNS is spoken."""
        # never above 10 s, and drawn, so that peers that start together do not ask together for ever
        self._next_s = now_s + _PAUSES_S[min(self._num_before, len(_PAUSES_S) - 1)] * random.uniform(0.8, 1.25)
        self._num_before += 1
        for seed in self._config.seeds:
            self._tasks.spawn(self._seed(*parse_host_port(seed, FIRST_PORT)))
        # asking takes a while; whoever comes meanwhile is served by the next round
        if self._config.use_mdns and not self._is_discovering:
            self._is_discovering = True
            try:
                await self._discover(own, interfaces)
            except OSError as error:
                self._say_mdns(str(error.strerror or error))
            finally:
                self._is_discovering = False

    async def _seed(self, host: str, port: int) -> None:
        found = await asyncio.to_thread(resolve, host)
        if not found and host not in self._unknown:
            _log.warning("--peer %s: no such host; trying again", host)
        (self._unknown.discard if found else self._unknown.add)(host)
        for address in found[:_MAX_SEED_ADDRESSES]:
            self._on_seed(address, port)

    async def _discover(self, own: PeerInfo, interfaces: tuple[str, ...]) -> None:
        """Raises OSError where this host has no multicast now."""
        if self._discovery is not None:
            await self._discovery.move(interfaces, own)
            return
        from meshserve.mesh.discovery import MdnsDiscovery  # a slow import that peers without mDNS need not wait for

        discovery = MdnsDiscovery(self._on_announced)
        await discovery.start(interfaces)
        self._discovery = discovery
        self._say_mdns("on")
        if not own.is_observer:
            discovery.announce(own)

    def _say_mdns(self, state: str) -> None:
        if state not in (self.mdns, "on"):
            _log.warning("mDNS does not work here (%s): peers are found by --peer only; trying again", state)
        elif state == "on" and self.mdns != "off":
            _log.warning("mDNS works now")
        self.mdns = state

    async def close(self) -> None:
        """Withdraw what was announced, and stop."""
        await self._tasks.close()
        if self._discovery is not None:
            await self._discovery.close()
