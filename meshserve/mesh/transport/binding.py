"""The four consecutive ports of a peer: calls, bulk, tickets, and one in reserve."""

import errno
from collections.abc import Sequence
from dataclasses import dataclass

import zmq

from meshserve.config import FIRST_PORT, PORTS_PER_PEER
from meshserve.errors import StartupFailed
from meshserve.mesh.transport.sockets import SocketFactory, endpoint

_LAST_PORT = 65_532


@dataclass(slots=True)
class BoundPorts:
    """A peer's bound sockets. `calls` is handed to the transport, which closes it."""

    first: int
    calls: "zmq.Socket[bytes]"
    bulk: "zmq.Socket[bytes]"
    tickets: "zmq.Socket[bytes]"

    def close(self) -> None:
        """Close all of them; harmless for those that are closed already."""
        for socket in (self.calls, self.bulk, self.tickets):
            socket.close()


def bind_port_block(factory: SocketFactory, hosts: Sequence[str], first: int | None) -> BoundPorts:
    """Bind the block that starts at `first`, or the first free one from 7800 on. Raises StartupFailed with what to do."""
    if first is not None and not 0 < first <= _LAST_PORT:
        raise StartupFailed(f"--port {first}: a peer uses four ports from there on, so it must be between 1 and {_LAST_PORT}")
    for port in [first] if first is not None else range(FIRST_PORT, _LAST_PORT, PORTS_PER_PEER):
        try:
            return _bind(factory, hosts, port)
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRINUSE and first is None:
                continue
            if error.errno == errno.EADDRINUSE:
                raise StartupFailed(
                    f"port {port}, or one of the three after it, is taken: choose another with --port, or leave it out"
                ) from error
            raise StartupFailed(f"cannot listen on {', '.join(hosts)} port {port}: {error.strerror}") from error
    raise StartupFailed("no four free ports in a row from 7800 on")


def _bind(factory: SocketFactory, hosts: Sequence[str], first: int) -> BoundPorts:
    sockets = [factory.server_socket(kind) for kind in (zmq.ROUTER, zmq.ROUTER, zmq.PULL)]
    try:
        for offset, socket in enumerate(sockets):
            for host in hosts:
                socket.bind(endpoint(host, first + offset))
    except BaseException:
        for socket in sockets:
            socket.close()
        raise
    return BoundPorts(first, *sockets)
