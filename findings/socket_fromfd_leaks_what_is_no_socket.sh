#!/usr/bin/env bash
# CPython 3.10 to 3.13: `socket.fromfd` leaves a descriptor open whenever it raises.
#
# One would guess: a call that fails gives back what it took; all the more where it is used in a `with`.
#
# What happens: `fromfd` duplicates the descriptor first and makes a socket of the duplicate then. Where the descriptor is no
# socket (a file, an eventfd), making the socket raises OSError, and nobody closes the duplicate, to which no name leads.
#
# Why it matters: descriptors that a library reports (a ZeroMQ monitor event, a message's SRCFD) may be closed by the time
# they are looked at, and their number given to something else. Each such look costs a descriptor for good, and a peer that
# meets many newcomers runs out of them. `os.dup`, then `socket.socket(fileno=...)`, and `os.close` where that raises, does not.
set -euo pipefail
python3 - <<'END'
import os
import socket
import sys


def num_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def looked_at(make):
    """Descriptors that ten looks at what is no socket leave open."""
    read, write = os.pipe()
    before, errors = num_open(), 0
    for _ in range(10):
        try:
            make(read).close()
        except OSError:
            errors += 1
    left = num_open() - before
    os.close(read)
    os.close(write)
    return left, errors


def by_hand(descriptor: int) -> socket.socket:
    copy = os.dup(descriptor)
    try:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=copy)
    except OSError:
        os.close(copy)
        raise


print("Python", sys.version.split()[0])
seen = {
    "fromfd": looked_at(lambda descriptor: socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM)),
    "dup, socket, close": looked_at(by_hand),
}
for what, (left, errors) in seen.items():
    print(f"{what}: {errors} errors, {left} descriptors left open")
assert seen == {"fromfd": (10, 10), "dup, socket, close": (0, 10)}, "this changed"
END
