"""How many sockets and descriptors a peer can have, and needs."""

import os
import resource
from contextlib import closing

import zmq

from meshserve.config import TransportConfig
from meshserve.mesh.transport.reading import address_of
from meshserve.mesh.transport.sockets import SocketFactory
from meshserve.telemetry import Counters


def test_a_peer_can_have_more_sockets_and_files_than_the_defaults_allow() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], 1024), before[1]))
    try:
        with closing(SocketFactory(TransportConfig(), None, Counters())) as factory:
            sockets = [factory.client_socket(zmq.DEALER) for _ in range(1500)]
            assert not any(socket.closed for socket in sockets)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_looking_at_a_descriptor_that_is_no_socket_any_more_leaves_none_open() -> None:
    read, write = os.pipe()
    try:
        assert [address_of(read), address_of(write)] == ["", ""]  # a duplicate that stays is found after the test
    finally:
        os.close(read)
        os.close(write)
    assert address_of(read) == ""
