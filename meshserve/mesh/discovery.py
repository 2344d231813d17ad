"""mDNS: how peers on a LAN hear of each other. The only importer of zeroconf.

mDNS gives hints and never more: records outlive their peers, and anyone can forge or withdraw them.
A peer that is found is dialled, and its hello decides. Questions are asked by multicast: with
several responders on a host, zeroconf's default of asking for a unicast answer first took over a
second to be answered, a multicast one 0.05 to 0.19 s.
"""

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import Callable

from zeroconf import DNSQuestionType, IPVersion, NonUniqueNameException, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from meshserve.config import PROTOCOL_MAJOR
from meshserve.mesh.tasks import TaskOwner
from meshserve.wire.hello import MAX_ADDRESSES, PeerHint, PeerInfo

SERVICE_TYPE = "_meshserve._tcp.local."
_REQUEST_MS = 2000
_MAX_LOOKUPS = 64
_MAX_ORDERED = 8
"""Addresses in TXT, where their order survives: 136 bytes of the 400 that a record should not exceed."""
_MAX_LABEL_BYTES = 63

_log = logging.getLogger(__name__)


class MdnsDiscovery:
    """Announces one peer and reports the others, each with the mesh that it says it is of."""

    def __init__(self, on_announced: Callable[[str, PeerHint], None]) -> None:
        self._on_announced = on_announced
        self._num_announced = 0
        self._announced: AsyncServiceInfo | None = None
        self._registering: asyncio.Task[None] | None = None
        self._announced_addresses: tuple[str, ...] = ()
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._tasks = TaskOwner()
        self._num_lookups = 0

    async def start(self, interfaces: tuple[str, ...]) -> None:
        """Browse on these. Raises OSError where this host has no multicast now; it may be started again."""
        chosen = list(interfaces)
        try:
            self._zeroconf = AsyncZeroconf(interfaces=chosen, ip_version=IPVersion.All)
        except OSError:
            self._zeroconf = AsyncZeroconf(interfaces=chosen, ip_version=IPVersion.V4Only)
        except RuntimeError as error:  # zeroconf's word for having found no interface at all
            raise OSError(str(error)) from error
        self._browse()

    def _browse(self) -> None:
        assert self._zeroconf is not None
        self._browser = AsyncServiceBrowser(
            self._zeroconf.zeroconf, SERVICE_TYPE, handlers=[self._on_change], question_type=DNSQuestionType.QM
        )

    async def move(self, interfaces: tuple[str, ...], info: PeerInfo) -> None:
        """Speak on these interfaces from now on, announce what changed, and ask again who is there.

        A browser asks four times in its first 14 s, and then only when a record is about to run out: so asking again
        takes a new one.
        """
        assert self._zeroconf is not None
        await self._zeroconf.async_update_interfaces(list(interfaces))
        if self._announced is not None and info.addresses != self._announced_addresses:
            self._announced = self._record(info)
            self._tasks.spawn(self._update(self._zeroconf, self._announced))
        if self._browser is not None:
            await self._browser.async_cancel()
        self._browse()

    def announce(self, info: PeerInfo) -> None:
        """Say, in the background, that this peer is here; probing the name takes about a second,
        and nobody waits for it."""
        assert self._zeroconf is not None
        self._announced = self._record(info)
        self._registering = self._tasks.spawn(self._register(self._zeroconf, self._announced))

    def _record(self, info: PeerInfo) -> AsyncServiceInfo:
        self._num_announced += 1
        self._announced_addresses = info.addresses
        return AsyncServiceInfo(
            SERVICE_TYPE,
            f"{_label(info)}.{SERVICE_TYPE}",
            parsed_addresses=list(info.addresses),
            port=info.port,
            properties={
                "mesh": info.mesh,
                "inc": info.incarnation,
                "v": str(PROTOCOL_MAJOR),
                "n": str(self._num_announced),
                "a": pack_addresses(info.addresses[:_MAX_ORDERED]),
            },
            server=f"{info.incarnation}.local.",
        )

    async def _update(self, zeroconf: AsyncZeroconf, record: AsyncServiceInfo) -> None:
        if self._registering is not None:  # while the name is probed, our own new record would look like another's
            await asyncio.wait([self._registering])
        await (await zeroconf.async_update_service(record))

    async def _register(self, zeroconf: AsyncZeroconf, record: AsyncServiceInfo) -> None:
        try:
            await (await zeroconf.async_register_service(record))
        except NonUniqueNameException:
            _log.warning("mDNS: somebody else announces this peer's own incarnation; not announced")

    def _on_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed or (self._announced is not None and name == self._announced.name):
            return  # a goodbye record ends no link
        info = AsyncServiceInfo(service_type, name)
        if info.load_from_cache(zeroconf):
            self._report(info)
        elif self._num_lookups < _MAX_LOOKUPS:
            self._num_lookups += 1
            self._tasks.spawn(self._look_up(zeroconf, info))

    async def _look_up(self, zeroconf: Zeroconf, info: AsyncServiceInfo) -> None:
        try:
            if await info.async_request(zeroconf, _REQUEST_MS, DNSQuestionType.QM):
                self._report(info)
        finally:
            self._num_lookups -= 1

    def _report(self, info: AsyncServiceInfo) -> None:
        texts = {key.decode(errors="replace"): (value or b"").decode(errors="replace") for key, value in info.properties.items()}
        # zeroconf gives the addresses of the records out in the order of their hashes; those in TXT are in the peer's own
        addresses = tuple(dict.fromkeys((*unpack_addresses(info.properties.get(b"a") or b""), *info.parsed_addresses(IPVersion.All))))
        incarnation = texts.get("inc", "")
        if not 0 < len(texts.get("mesh", "")) <= 63 or not 0 < len(incarnation) <= 64 or not addresses or not info.port:
            return
        self._on_announced(texts["mesh"], PeerHint(incarnation, addresses[:MAX_ADDRESSES], info.port))

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


def _label(info: PeerInfo) -> str:
    """What people read in a browser of services, such as `kitchen (decode,prefill) 3f2a`: unique by the incarnation's digits."""
    ending = f" ({','.join(info.roles)}) {info.incarnation[:4]}"
    name = "".join(character if character.isprintable() and character != "." else "-" for character in info.name)
    room_bytes = _MAX_LABEL_BYTES - len(ending.encode())
    return name.encode()[:room_bytes].decode(errors="ignore") + ending


def pack_addresses(addresses: tuple[str, ...]) -> bytes:
    """Four or sixteen bytes each, behind one that says which."""
    packed = (ipaddress.ip_address(address).packed for address in addresses)
    return b"".join(bytes([len(data)]) + data for data in packed)


def unpack_addresses(data: bytes) -> tuple[str, ...]:
    """The addresses in their order, up to the first that is malformed: whatever a stranger announces."""
    found: list[str] = []
    while data and data[0] in (4, 16) and len(data) > data[0]:
        found.append(str(ipaddress.ip_address(data[1 : 1 + data[0]])))
        data = data[1 + data[0] :]
    return tuple(found)
