"""What the operating system says of this process, by the names that Prometheus' own clients use (without `process_`).

Not by `prometheus_client.ProcessCollector`: the library takes 40 ms to import, which peers without a frontend need not wait for.
"""

import contextlib
import resource
import time
from pathlib import Path

_STARTED_S = time.time() - time.process_time()
"""By the wall clock, to some tenths of a second: this module is imported while the process starts."""
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
        found |= {"virtual_memory_bytes": float(virtual) * _PAGE_BYTES, "resident_memory_bytes": float(resident) * _PAGE_BYTES}
        found["open_fds"] = float(len(list(Path("/proc/self/fd").iterdir())) - 1)  # but for the one that lists them
    return found
