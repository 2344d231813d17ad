"""mDNS: how peers on a LAN hear of each other. The only importer of zeroconf.

mDNS gives hints and never more: records outlive their peers, and anyone can forge or withdraw them.
A peer that is found is dialled, and its hello decides. Questions are asked by multicast: with
several responders on a host, zeroconf's default of asking for a unicast answer first took over a
second to be answered, a multicast one 0.05 to 0.19 s.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from zeroconf import DNSQuestionType, IPVersion, NonUniqueNameException, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from meshserve.config import PROTOCOL_MAJOR
from meshserve.mesh.tasks import TaskOwner
from meshserve.wire.hello import PeerHint, PeerInfo

SERVICE_TYPE = "_meshserve._tcp.local."
_REQUEST_MS = 2000
_MAX_LOOKUPS = 64

_log = logging.getLogger(__name__)


class MdnsDiscovery:
    """Announces one peer and reports the others, each with the mesh that it says it is of."""

    def __init__(self, incarnation: str, interfaces: tuple[str, ...], on_announced: Callable[[str, PeerHint], None]) -> None:
        self._incarnation, self._on_announced = incarnation, on_announced
        self._interfaces = interfaces
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._tasks = TaskOwner()
        self._num_lookups = 0

    async def start(self) -> None:
        """Browse. Raises OSError where this host has no multicast."""
        chosen = list(self._interfaces)
        try:
            self._zeroconf = AsyncZeroconf(interfaces=chosen, ip_version=IPVersion.All)
        except OSError:
            self._zeroconf = AsyncZeroconf(interfaces=chosen, ip_version=IPVersion.V4Only)
        except RuntimeError as error:  # zeroconf's word for having found no interface at all
            raise OSError(str(error)) from error
        self._browser = AsyncServiceBrowser(
            self._zeroconf.zeroconf, SERVICE_TYPE, handlers=[self._on_change], question_type=DNSQuestionType.QM
        )

    def announce(self, info: PeerInfo) -> None:
        """Say, in the background, that this peer is here; probing the name takes about a second,
        and nobody waits for it."""
        assert self._zeroconf is not None
        record = AsyncServiceInfo(
            SERVICE_TYPE,
            f"{info.incarnation}.{SERVICE_TYPE}",
            parsed_addresses=list(info.addresses[:8]),
            port=info.port,
            properties={"mesh": info.mesh, "inc": info.incarnation, "v": str(PROTOCOL_MAJOR)},
            server=f"{info.incarnation}.local.",
        )
        self._tasks.spawn(self._register(self._zeroconf, record))

    async def _register(self, zeroconf: AsyncZeroconf, record: AsyncServiceInfo) -> None:
        try:
            await (await zeroconf.async_register_service(record))
        except NonUniqueNameException:
            _log.warning("mDNS: somebody else announces this peer's own incarnation; not announced")

    def _on_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed or name.startswith(self._incarnation):
            return  # a goodbye record ends no link
        info = AsyncServiceInfo(service_type, name)
        if info.load_from_cache(zeroconf):
            self._report(info)
        elif self._num_lookups < _MAX_LOOKUPS:
            self._tasks.spawn(self._look_up(zeroconf, info))

    async def _look_up(self, zeroconf: Zeroconf, info: AsyncServiceInfo) -> None:
        self._num_lookups += 1
        try:
            if await info.async_request(zeroconf, _REQUEST_MS, DNSQuestionType.QM):
                self._report(info)
        finally:
            self._num_lookups -= 1

    def _report(self, info: AsyncServiceInfo) -> None:
        texts = {key.decode(errors="replace"): (value or b"").decode(errors="replace") for key, value in info.properties.items()}
        addresses = info.parsed_addresses(IPVersion.All)
        incarnation = texts.get("inc", "")
        if not 0 < len(texts.get("mesh", "")) <= 63 or not 0 < len(incarnation) <= 64 or not addresses or not info.port:
            return
        usable = tuple(dict.fromkeys(address for address in addresses if not address.lower().startswith("fe80")))
        self._on_announced(texts["mesh"], PeerHint(incarnation, usable[:16], info.port))

    async def close(self) -> None:
        """Withdraw the records and stop."""
        await self._tasks.close()
        if self._browser is not None:
            await self._browser.async_cancel()
        if self._zeroconf is not None:
            with contextlib.suppress(OSError, TimeoutError, asyncio.TimeoutError):
                async with asyncio.timeout(2):
                    await self._zeroconf.async_unregister_all_services()
            await self._zeroconf.async_close()
