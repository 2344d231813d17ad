#!/usr/bin/env bash
# pyroute2 0.9.7: neither of its two interfaces can be used within a running uvloop.
#
# One would guess: the asynchronous interface runs on any event loop of asyncio, as it awaits; and the synchronous one is a
# blocking call, which any thread may make.
#
# What happens: AsyncIPRoute opens its netlink socket through `create_datagram_endpoint`, and uvloop takes no family but
# IPv4, IPv6 and Unix there: ValueError, from the first request on, while the object itself is made without a word. The
# synchronous IPRoute runs an event loop of its own in the calling thread, so within any running loop it raises RuntimeError.
# On asyncio's own loop the first works, and in a thread without a loop the second does.
#
# Why it matters: who watches interfaces in a program on uvloop has to ask in another thread, or to read the netlink socket
# by himself, which `loop.add_reader` does on uvloop too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pyroute2==0.9.7 uvloop==0.22.1

"$folder/venv/bin/python" - 2>/dev/null <<'END'
import asyncio
from importlib.metadata import version

import uvloop
from pyroute2 import AsyncIPRoute, IPRoute


async def asynchronous() -> str:
    try:
        async with AsyncIPRoute() as route:
            return "lists links" if [link async for link in await route.get_links()] else "lists nothing"
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


async def synchronous() -> str:
    try:
        with IPRoute() as route:
            return "lists links" if list(route.get_links()) else "lists nothing"
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def in_a_thread() -> str:
    with IPRoute() as route:
        return "lists links" if list(route.get_links()) else "lists nothing"


async def threaded() -> str:
    return await asyncio.to_thread(in_a_thread)


print("pyroute2", version("pyroute2"), "uvloop", version("uvloop"))
seen = {
    "asynchronous, asyncio's loop": asyncio.run(asynchronous()),
    "asynchronous, uvloop": uvloop.run(asynchronous()),
    "synchronous, within uvloop": uvloop.run(synchronous()),
    "synchronous, thread beside uvloop": uvloop.run(threaded()),
}
for what, outcome in seen.items():
    print(f"{what:34} {outcome}")
outcomes = list(seen.values())
is_same = (
    outcomes[0] == outcomes[3] == "lists links" and outcomes[1].startswith("ValueError") and outcomes[2].startswith("RuntimeError")
)
print("as described" if is_same else "CHANGED")
raise SystemExit(0 if is_same else 1)
END
