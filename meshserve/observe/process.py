"""The operating system's figures of this process, under the names of Prometheus' own clients.

The names lack `process_`. Not by `prometheus_client.ProcessCollector`: the library is slow to import,
and peers without a frontend need not wait for it.
"""

import contextlib
import resource
import time
from pathlib import Path

_STARTED_S = time.time() - time.process_time()
"""By the wall clock, to some tenths of a second: the process imports this module as it starts."""
_PAGE_BYTES = resource.getpagesize()


def process_figures() -> dict[str, float]:
    """CPU time, memory and files. Memory and the number of open files are known on Linux only."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    max_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    found = {
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "start_time_seconds": _STARTED_S,
        "max_fds": float(max_files) if max_files != resource.RLIM_INFINITY else -1.0,
    }
    with contextlib.suppress(OSError, ValueError):
        virtual, resident = Path("/proc/self/statm").read_text().split()[:2]
        found |= {
            "virtual_memory_bytes": float(virtual) * _PAGE_BYTES,
            "resident_memory_bytes": float(resident) * _PAGE_BYTES,
        }
        found["open_fds"] = float(
            len(list(Path("/proc/self/fd").iterdir())) - 1
        )  # but for the one that lists them
    return found
