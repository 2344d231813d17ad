"""What this machine can spare for a model: processor cores and memory."""

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def num_engine_threads(claimed: int = 0) -> int:
    """Physical cores that this process may use, less one for everything else and those whose threads others claimed, at least 1.

    A thread on a core that is busy otherwise, or two on one core, cost far more than they bring: every step waits for the slowest one.
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_read(_TOPOLOGY / f"cpu{number}/topology/core_cpus_list") or str(number) for number in usable}
    return max(1, len(cores) - 1 - claimed)


def available_bytes() -> int:
    """Memory that can be taken without swapping, within the limit of this process's control group."""
    found = [_meminfo_available() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2]
    limit, used = _read(_CGROUP / "memory.max"), _read(_CGROUP / "memory.current")
    if limit.isdigit() and used.isdigit():
        found.append(int(limit) - int(used))
    return max(0, min(found))


def _meminfo_available() -> int:
    """0 where the system has no such file."""
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
