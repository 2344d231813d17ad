"""The hello: how a dialled address becomes a link to a known peer, or a refusal that says why."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from meshserve.config import PROTOCOL_MAJOR, PROTOCOL_MINOR, MeshConfig
from meshserve.errors import HandshakeRefused, MeshserveError, PeerLost, ProtocolError, from_wire
from meshserve.mesh.hearsay import Dial
from meshserve.mesh.interfaces import Addresses, dialling_order
from meshserve.mesh.network import Outcome, knock
from meshserve.mesh.sightings import describe_stranger
from meshserve.mesh.tasks import TaskOwner
from meshserve.mesh.transport.channel import Channel
from meshserve.mesh.transport.reading import KEYS_DIFFER
from meshserve.mesh.transport.transport import Transport
from meshserve.telemetry import printable
from meshserve.wire.frames import HELLO, WELCOME, Envelope
from meshserve.wire.hello import Hello, PeerInfo, protocol_of


def check_hello(data: object, own: PeerInfo) -> Hello:
    """The hello of a peer that may be a member. Raises HandshakeRefused, or ProtocolError.

    Users of both peers read the refusal: it calls each by its name, as "this peer" would be another on the other side.
    """
    major, minor = protocol_of(data)
    if major != PROTOCOL_MAJOR:
        other = describe_stranger(data)
        older = other if major < PROTOCOL_MAJOR else own.name
        words = f"{other} speaks protocol {major}.{minor}, {own.name} {PROTOCOL_MAJOR}.{PROTOCOL_MINOR}"
        raise HandshakeRefused(f"{words}: upgrade meshserve of {older}", kind="protocol")
    hello = Hello.from_wire(data)
    if hello.peer.mesh != own.mesh:
        other = printable(hello.peer.name)
        raise HandshakeRefused(f"{own.name} belongs to the mesh {own.mesh!r}, {other} to {hello.peer.mesh!r}", kind="mesh")
    return hello


@dataclass(frozen=True, slots=True)
class Reached:
    """A dial that led to a peer."""

    channel: Channel
    hello: Hello
    address: tuple[str, int]


class AnotherAnswered(HandshakeRefused):
    """A peer lives at this address, and is not the one that was meant."""

    def __init__(self, name: str, incarnation: str, host: str) -> None:
        super().__init__(f"another peer lives there: {printable(name)}", kind="other")
        self.incarnation, self.host = incarnation, host


_Failure = MeshserveError | ConnectionRefusedError
"""Why one address did not lead to the peer."""


class DialFailed(MeshserveError):
    """No address led to the peer.

    `is_refused`: every one was refused by a host that is there. `kinds`: those of refused hellos. `answered_by`: another
    peer's incarnation, by the address at which it answered.
    """

    code = "dial_failed"

    def __init__(self, failures: list[_Failure]) -> None:
        super().__init__("; ".join(dict.fromkeys(map(str, failures))))
        self.is_refused = bool(failures) and all(isinstance(failure, ConnectionRefusedError) for failure in failures)
        self.kinds = tuple(failure.kind for failure in failures if isinstance(failure, HandshakeRefused))
        self.answered_by = {failure.host: failure.incarnation for failure in failures if isinstance(failure, AnotherAnswered)}


_MAX_STAGGERED = 4


def _delay_s(index: int, stagger_s: float) -> float:
    """Before an address is tried. The likely ones come first and get time to answer; of many others none has to wait long."""
    return min(index, _MAX_STAGGERED) * stagger_s + max(0, index - _MAX_STAGGERED) * stagger_s / 5


class _Greeting(NamedTuple):
    """A hello without an answer yet: the incarnation that should answer (None: any), and the host."""

    expected: str | None
    host: str
    answer: asyncio.Future[Hello]


class Dialler:
    """Dials peers: all their addresses, each a little later than the one before, until one answers with the right hello."""

    def __init__(
        self, config: MeshConfig, transport: Transport, own_hello: Callable[[str | None], Hello], addresses: Addresses
    ) -> None:
        self._config, self._transport, self._own_hello = config, transport, own_hello
        self.addresses = addresses
        """This host's own, which tell what it reaches best."""
        self.is_closed = False
        """This peer leaves: no further hello is sent."""
        self._greeted: dict[Channel, _Greeting] = {}

    def answered(self, channel: Channel, message: Envelope) -> bool:
        """A WELCOME or REFUSED came in; False if no dial waits for it."""
        greeting = self._greeted.get(channel)
        if greeting is None or greeting.answer.done():
            return False
        try:
            hello = self._checked(message, greeting.expected, greeting.host)
        except MeshserveError as error:
            greeting.answer.set_exception(error)
        else:
            channel.peer = hello.peer.incarnation  # now, because a goodbye may be the next frame
            greeting.answer.set_result(hello)
        return True

    def lost(self, channel: Channel, reason: str) -> None:
        """The channel broke before its welcome."""
        greeting = self._greeted.get(channel)
        if greeting is not None and not greeting.answer.done():
            greeting.answer.set_exception(PeerLost(reason))

    async def dial(self, dial: Dial) -> Reached:
        """Raises DialFailed with the reason of each address."""
        owner = TaskOwner()
        hosts = dialling_order(dial.addresses, self.addresses.local)
        stagger_s = self._config.dial_stagger_s
        attempts = [owner.spawn(self._attempt(dial, host, _delay_s(index, stagger_s))) for index, host in enumerate(hosts)]
        failures: list[_Failure] = []
        chosen: Reached | None = None
        try:
            for finished in asyncio.as_completed(attempts):
                outcome = await finished
                if isinstance(outcome, Reached):
                    chosen = outcome
                    return outcome
                failures.append(outcome)
        finally:
            await owner.close()
            for task in attempts:  # two addresses may have answered in one turn
                other = task.result() if task.done() and not task.cancelled() else None
                if isinstance(other, Reached) and other is not chosen:
                    self._transport.drop(other.channel)
        raise DialFailed(failures)

    async def _attempt(self, dial: Dial, host: str, delay_s: float) -> "Reached | _Failure":
        await asyncio.sleep(delay_s)
        try:
            # A bare TCP connection first, for its clear answer: refused, no answer, no way.
            met = await knock(host, dial.port, self._config.dial_timeout_s)
            if met.outcome is Outcome.REFUSED:
                return ConnectionRefusedError(f"{host}:{dial.port} refused the connection")
            if met.outcome is not Outcome.OPEN:
                return PeerLost(f"{host}:{dial.port}{met.reason}")
            return await self._greet(dial, host)
        except MeshserveError as error:
            # a peer that is killed meanwhile closes a connection as one with another key does, but takes no further one
            if KEYS_DIFFER not in error.message:
                return error
            again = await knock(host, dial.port, self._config.dial_timeout_s)
            if again.outcome is Outcome.REFUSED:
                return ConnectionRefusedError(f"{host}:{dial.port} closed the connection and takes no other")
            return error if again.outcome is Outcome.OPEN else PeerLost(f"{host}:{dial.port} closed the connection, then{again.reason}")

    async def _greet(self, dial: Dial, host: str) -> Reached:
        channel = await self._transport.dial(host, dial.port, self._config.dial_timeout_s)
        answer: asyncio.Future[Hello] = asyncio.get_running_loop().create_future()
        self._greeted[channel] = _Greeting(dial.incarnation, host, answer)
        try:
            if self.is_closed:
                raise PeerLost("this peer leaves")
            channel.send([HELLO, self._own_hello(dial.incarnation).to_wire()])
            async with asyncio.timeout(self._config.dial_timeout_s):
                return Reached(channel, await answer, (host, dial.port))
        except BaseException as error:
            self._transport.drop(channel)
            if isinstance(error, TimeoutError):
                raise PeerLost(f"{host}:{dial.port} took the connection but says nothing") from error
            raise
        finally:
            del self._greeted[channel]

    def _checked(self, message: Envelope, expected: str | None, host: str) -> Hello:
        if message[0] != WELCOME:
            raise from_wire(message[1])
        try:
            hello = check_hello(message[1], self._own_hello(None).peer)
        except ProtocolError as error:
            raise HandshakeRefused("it answered with something that is no hello", kind="hello") from error
        if expected is not None and hello.peer.incarnation != expected:
            raise AnotherAnswered(hello.peer.name, hello.peer.incarnation, host)
        return hello
