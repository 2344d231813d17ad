"""The one place where ZeroMQ sockets are made, with the mesh's keys if there are any.

With a key every socket is a CURVE server or client of the one key pair that the secret gives, and ZAP admits only that public
key (RFC 26 and 27 of ZeroMQ). It fails closed: the ZAP domain is not empty and enforced, so that without a running handler
nobody gets in, and a self-test at start tries a wrong key, which must be refused.
"""

import contextlib
import errno
import logging
import resource
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from meshserve.config import FIRST_PORT, PORTS_PER_PEER, TransportConfig
from meshserve.errors import KeyRefused, StartupFailed
from meshserve.mesh.keys import MeshKey
from meshserve.telemetry import Counters

_log = logging.getLogger(__name__)

_ZAP_DOMAIN = "meshserve"

_MAX_SOCKETS = 16_384
"""A link takes three, its own and two that watch it: ZeroMQ's default of 1,023 would end a mesh at 340 peers. A slot costs 12 bytes."""

_MAX_FILES = 65_536
"""A link takes five or six: the common limit of 1,024 would end it at 180. Higher lets a peer hold more of the host's files."""


class _OnlyHolders:
    """The ZAP rule: the one public key of the mesh, and no other."""

    def __init__(self, public: bytes, counters: Counters) -> None:
        self._public, self._counters = public, counters

    def callback(self, domain: str, key: bytes) -> bool:
        """Asked by the authenticator's thread for every connection."""
        is_holder = key == self._public
        if not is_holder:
            self._counters.add("strangers_refused")
        return is_holder


class SocketFactory:
    """Owns the ZeroMQ context of a peer, and makes its sockets. `close` closes whatever is still open."""

    def __init__(
        self, config: TransportConfig, key: MeshKey | None, counters: Counters, silence_limit_s: float = 6.5
    ) -> None:
        """ZeroMQ's own heartbeats close a connection that is silent for `silence_limit_s`: they notice a dead host on
        links without application heartbeats."""
        self._config, self._counters = config, counters
        _ask_for_files()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
        self._pair: tuple[bytes, bytes] | None = None
        self._authenticator: ThreadAuthenticator | None = None
        self._silence_limit_ms = max(1000, int(silence_limit_s * 1000))
        if key is not None:
            try:
                self._start_security(key)
            except BaseException:
                self.close()
                raise

    @property
    def has_key(self) -> bool:
        """Whether strangers are kept out."""
        return self._pair is not None

    def _start_security(self, key: MeshKey) -> None:
        secret = z85.encode(key.curve_secret())
        public: bytes = zmq.curve_public(secret)
        self._pair = (public, secret)
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(_ZAP_DOMAIN, credentials_provider=_OnlyHolders(public, self._counters))
        self._self_test()

    def _self_test(self) -> None:
        """A stranger's key must be refused and ours let in, or the peer does not start."""
        if self._gets_in(zmq.curve_keypair()) or not self._gets_in(self._pair):
            raise KeyRefused("the self-test of the keys failed: this ZeroMQ library does not enforce them; not starting")
        self._counters.add("strangers_refused", -1)

    def _gets_in(self, pair: tuple[bytes, bytes] | None) -> bool:
        assert self._pair is not None
        server, client = self.server_socket(zmq.ROUTER), self._context.socket(zmq.DEALER)
        try:
            client.setsockopt(zmq.LINGER, 0)
            client.curve_serverkey = self._pair[0]
            client.curve_publickey, client.curve_secretkey = pair or self._pair
            port = server.bind_to_random_port("tcp://127.0.0.1")  # inproc has no handshake, so it would prove nothing
            monitor = client.get_monitor_socket(
                zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            )
            client.connect(f"tcp://127.0.0.1:{port}")
            if not monitor.poll(2000):
                return False
            (event,) = struct.unpack("=H", monitor.recv_multipart()[0][:2])
            return bool(event == zmq.EVENT_HANDSHAKE_SUCCEEDED)
        finally:
            client.disable_monitor()
            client.close()
            server.close()

    def _socket(self, kind: int) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)  # what matters is acknowledged above, never owed by a socket
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, self._config.max_message_bytes)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 1000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, self._silence_limit_ms)
        socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
        return socket

    def server_socket(self, kind: int, max_frame_bytes: int | None = None) -> "zmq.Socket[bytes]":
        """A ROUTER or PULL socket that the caller binds. A frame that is too long ends its connection."""
        socket = self._socket(kind)
        if max_frame_bytes is not None:
            socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
        if kind == zmq.ROUTER:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if self._pair is not None:
            socket.setsockopt_string(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = self._pair
        return socket

    def client_socket(self, kind: int) -> "zmq.Socket[bytes]":
        """A socket to be connected once: DEALER or PUSH. It never re-connects by itself: a lost link is the mesh's business."""
        socket = self._socket(kind)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        if self._pair is not None:
            socket.curve_serverkey = self._pair[0]
            socket.curve_publickey, socket.curve_secretkey = self._pair
        return socket

    def close(self) -> None:
        """End the authenticator's thread and the context. Safe to call twice."""
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        self._context.destroy(linger=0)


def _ask_for_files() -> None:
    """As many as this process may have, up to what a large mesh takes. Where that is not allowed the mesh stays smaller."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(_MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def endpoint(host: str, port: int) -> str:
    """ZeroMQ's form of an address; IPv6 ones in brackets."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


# --- the four consecutive ports of a peer: calls, bulk, tickets, and one in reserve

BULK_OFFSET, TICKETS_OFFSET = 1, 2
BULK_FRAME_BYTES = 256 * 1024
"""The longest frame on the bulk port: half a second on 4 Mbit/s. ZeroMQ's heartbeat counts whole frames."""
_CURVE_BYTES = 33
"""Bytes that a frame has besides its content, if the mesh has a key."""
_LAST_PORT = 65_532


@dataclass(slots=True)
class BoundPorts:
    """A peer's bound sockets. `calls` is handed to the transport, which closes it."""

    first: int
    calls: "zmq.Socket[bytes]"
    bulk: "zmq.Socket[bytes]"
    tickets: "zmq.Socket[bytes]"

    def move(self, before: Sequence[str], hosts: Sequence[str]) -> None:
        """Listen on these addresses instead of those before. One that cannot be bound is said and left out."""
        for offset, socket in enumerate((self.calls, self.bulk, self.tickets)):
            for host in before:
                if host not in hosts:
                    with contextlib.suppress(zmq.ZMQError):  # its address is gone, and the listener may be as well
                        socket.unbind(endpoint(host, self.first + offset))
            for host in hosts:
                if host not in before:
                    try:
                        socket.bind(endpoint(host, self.first + offset))
                    except zmq.ZMQError as error:
                        _log.warning("cannot listen on %s port %d: %s", host, self.first + offset, error.strerror)

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
    kinds = (zmq.ROUTER, None), (zmq.ROUTER, BULK_FRAME_BYTES + _CURVE_BYTES), (zmq.PULL, None)
    sockets = [factory.server_socket(kind, max_frame_bytes) for kind, max_frame_bytes in kinds]
    try:
        for offset, socket in enumerate(sockets):
            for host in hosts:
                socket.bind(endpoint(host, first + offset))
    except BaseException:
        for socket in sockets:
            socket.close()
        raise
    return BoundPorts(first, *sockets)
