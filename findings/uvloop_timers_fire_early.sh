#!/usr/bin/env bash
# uvloop 0.23.0: a timer can end before its delay is over.
#
# One would guess: `asyncio.sleep(d)` and `loop.call_later(d, ...)` wait for d seconds or longer, whatever the event loop. asyncio's own
# loop keeps this promise: it rounds a delay up to its timer's resolution. uvloop is called a faster drop-in replacement.
#
# What happens: uvloop rounds a delay to the nearest whole millisecond, and `loop.time()` moves in steps of a millisecond. A delay below
# half a millisecond is no delay at all; 2.4 ms can be over after little more than 1 ms.
#
# Why it matters: a loop that paces itself with short sleeps (a token every 0.4 ms, say) runs without any pause under uvloop. Code that
# wakes at a deadline, reads the clock and sleeps for the rest wakes too early, several times. Durations of less than some milliseconds
# that are measured with `loop.time()` are 0 or 1 ms.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uvloop==0.23.0

"$folder/venv/bin/python" - <<'END'
import asyncio
import time
from importlib.metadata import version

import uvloop

DELAYS_S = (0.0004, 0.0024)
ROUNDS = 300


async def observe() -> dict:
    """How many of the sleeps were too short, the shortest one, and the smallest step of the loop's clock."""
    seen = {}
    for delay_s in DELAYS_S:
        slept = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            await asyncio.sleep(delay_s)
            slept.append(time.perf_counter() - start)
        seen[delay_s] = (sum(duration < delay_s for duration in slept), min(slept))
    loop, times = asyncio.get_running_loop(), set()
    for _ in range(3000):
        await asyncio.sleep(0)
        times.add(loop.time())
    ordered = sorted(times)
    seen["step"] = min(later - earlier for earlier, later in zip(ordered, ordered[1:]))
    return seen


print("uvloop", version("uvloop"))
results = {"asyncio": asyncio.run(observe()), "uvloop": uvloop.run(observe())}
for name, seen in results.items():
    for delay_s in DELAYS_S:
        early, shortest_s = seen[delay_s]
        print(f"{name:8} sleep({delay_s}): {early} of {ROUNDS} too short, the shortest {shortest_s * 1e3:.3f} ms")
    print(f"{name:8} smallest step of loop.time(): {seen['step'] * 1e3:.3f} ms")

same = all(results["asyncio"][delay_s][0] == 0 for delay_s in DELAYS_S) and results["asyncio"]["step"] < 0.0005
same = same and results["uvloop"][0.0004][0] > ROUNDS // 2 and results["uvloop"][0.0024][0] > 0 and results["uvloop"]["step"] > 0.0009
print("as described" if same else "CHANGED")
raise SystemExit(0 if same else 1)
END
