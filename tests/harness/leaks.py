"""What a test has left behind: threads, children, contexts, connections and loops that were not there before it."""

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import uvloop
import zmq

from tests.harness.spawning import start_server

PR_SET_CHILD_SUBREAPER = 36
TASKS = Path("/proc/self/task")
DESCRIPTORS = Path("/proc/self/fd")

# the kernel's names of the threads that every ZeroMQ context runs once it has a socket
ZMQ_THREADS = ("ZMQbg/Reaper", "ZMQbg/IO/")
# files and terminals warn for themselves when nobody closes them
WATCHED_DESCRIPTORS = ("socket:", "pipe:", "anon_inode:")


def prepare() -> None:
    """Adopt the orphans of killed children, and start now what libraries keep for the whole life of a process."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # libuv's pipe for signals comes with the first loop and stays
    uvloop.new_event_loop().close()
    _start_zmq_collector()
    if sys.platform.startswith("linux"):
        start_server()


def inventory() -> set[str]:
    """Return a description of each thing there is now that a test could leave behind."""
    return {*_threads(), *_children(), *_native()}


def left_since(before: set[str]) -> set[str]:
    """Return what is there now and was not in `before`, after letting garbage go if need be."""
    if not inventory() - before:
        return set()
    gc.collect()
    return inventory() - before


def _start_zmq_collector() -> None:
    # pyzmq starts a thread and a context at the first large message that is sent without a copy, and keeps them
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://first")
        other.connect("inproc://first")
        other.send(bytes(zmq.COPY_THRESHOLD), copy=False)
        one.recv()


def _threads() -> Iterator[str]:
    for thread in threading.enumerate():
        yield f"thread {thread.name!r} ({thread.ident})"


def _children() -> Iterator[str]:
    for task in _entries(TASKS):
        for pid in _text(task / "children").split():
            command = _text(Path("/proc", pid, "cmdline")).replace("\0", " ").strip()
            yield f"child process {pid} {command or '(ended, not waited for)'}"


def _native() -> Iterator[str]:
    for task in _entries(TASKS):
        if (name := _text(task / "comm").strip()).startswith(ZMQ_THREADS):
            yield f"ZeroMQ context ({name}, thread {task.name})"
    for descriptor in _entries(DESCRIPTORS):
        if (target := _target(descriptor)).startswith(WATCHED_DESCRIPTORS):
            yield f"open descriptor {descriptor.name} {target}"


def _entries(directory: Path) -> list[Path]:
    # absent on systems other than Linux
    return list(directory.iterdir()) if directory.exists() else []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _target(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""
