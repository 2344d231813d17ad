"""What is left behind is named."""

import asyncio
import socket
import subprocess
import threading

import uvloop
import zmq

from tests.harness.leaks import inventory, left_since


def test_nothing_is_left_by_a_test_that_does_nothing() -> None:
    before = inventory()
    assert left_since(before) == set()


def test_a_thread_is_named() -> None:
    before = inventory()
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="forgotten")
    thread.start()
    left = left_since(before)
    end.set()
    thread.join()
    assert any("forgotten" in item for item in left)
    assert left_since(before) == set()


def test_a_child_process_is_named_running_or_not_waited_for() -> None:
    before = inventory()
    with subprocess.Popen(["sleep", "60"]) as child:
        left = left_since(before)
        child.kill()
    assert any(f"child process {child.pid}" in item for item in left)
    assert left_since(before) == set()


def test_a_context_is_named() -> None:
    before = inventory()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = context.socket(zmq.PAIR)
    left = left_since(before)
    made.close()
    context.term()
    assert any("ZeroMQ context" in item for item in left)


def test_what_pyzmq_keeps_for_messages_sent_without_a_copy_is_not_held_against_a_test() -> None:
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://here")
        other.connect("inproc://here")
        other.send(bytes(1_000_000), copy=False)
        assert len(one.recv()) == 1_000_000


def test_event_loops_and_connections_are_named() -> None:
    for make in (uvloop.new_event_loop, asyncio.new_event_loop, socket.socket):
        before = inventory()
        made = make()
        left = left_since(before)
        made.close()
        assert any("open descriptor" in item for item in left), make
        assert left_since(before) == set()
