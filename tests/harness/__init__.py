"""Hosts, processes, faults and waiting: what every test of a running mesh is built on."""

from tests.harness.lan import Host, Lan
from tests.harness.loops import run_async
from tests.harness.processes import ALL_ROLES, Completed, Process, meshserve_command, run_command
from tests.harness.waiting import pace, pace_async, until, until_awaited, wait_until

__all__ = [
    "ALL_ROLES",
    "Completed",
    "Host",
    "Lan",
    "Process",
    "meshserve_command",
    "pace",
    "pace_async",
    "run_async",
    "run_command",
    "until",
    "until_awaited",
    "wait_until",
]
