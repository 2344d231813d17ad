"""The capture that counts what crossed, and the bit that flips on the way: on hosts whose traffic the test makes itself."""

import socket
import threading
from pathlib import Path

import pytest

from tests.harness import Host, Lan
from tests.harness.capture import Capture, Segment, missing_tool, num_stream_bytes

PORT, NUM_BYTES = 7801, 3_000_000
STREAM, OTHER = (b"a", b"b", 1, PORT), (b"a", b"b", 2, PORT)


def send_zeros(sender: Host, receiver: Host, address: str) -> bytes:
    """What came of them."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = receiver.inside(lambda: socket.create_server((address, PORT), family=family))
    received = bytearray()

    def receive() -> None:
        connection, _ = server.accept()
        with connection:
            while data := connection.recv(1 << 20):
                received.extend(data)

    thread = threading.Thread(target=receive)
    thread.start()
    with sender.connect(address, PORT) as connection:
        connection.sendall(bytes(NUM_BYTES))
    thread.join(10.0)
    server.close()
    return bytes(received)


@pytest.mark.lan
@pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))
@pytest.mark.parametrize("loss_percent", [0.0, 5.0])
@pytest.mark.parametrize("version", [4, 6])
def test_what_is_sent_again_counts_once(lan: Lan, tmp_path: Path, version: int, loss_percent: float) -> None:
    sender, receiver = lan.add_host(), lan.add_host()
    if loss_percent:
        sender.drop_packets(loss_percent)
    address = receiver.address if version == 4 else receiver.address6
    # on the sender's side, where all that is lost on the way is seen twice
    with Capture(sender, PORT, tmp_path / "packets") as capture:
        assert len(send_zeros(sender, receiver, address)) == NUM_BYTES
        assert capture.num_bytes_in() == NUM_BYTES


@pytest.mark.lan
def test_exactly_one_bit_of_a_long_transfer_flips(lan: Lan) -> None:
    sender, receiver = lan.add_host(), lan.add_host()
    receiver.flip_one_bit(PORT)
    received = send_zeros(sender, receiver, receiver.address)
    assert len(received) == NUM_BYTES and sum(value.bit_count() for value in received) == 1
    assert not any(send_zeros(sender, receiver, receiver.address))


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([], 0),
        ([(STREAM, 10, 5), (STREAM, 15, 5)], 10),
        ([(STREAM, 15, 5), (STREAM, 10, 5)], 10),
        ([(STREAM, 10, 5), (STREAM, 10, 5), (STREAM, 12, 6)], 8),
        ([(STREAM, 10, 20), (STREAM, 12, 3)], 20),
        ([(STREAM, 10, 5), (OTHER, 10, 5)], 10),
        ([(STREAM, 2**32 - 3, 6), (STREAM, 3, 6), (STREAM, 2**32 - 1, 2)], 12),
        ([(STREAM, 3, 6), (STREAM, 2**32 - 3, 6)], 12),
    ],
)
def test_bytes_of_streams_are_counted_once(segments: list[tuple[tuple[bytes, bytes, int, int], int, int]], expected: int) -> None:
    assert num_stream_bytes(Segment(*segment) for segment in segments) == expected
