"""Whether this process may make hosts, and what to do about tests that need them where it may not."""

import functools
import os
import shutil
import sys

from tests.harness.lan import Lan
from tests.harness.namespaces import ToolError


@functools.cache
def missing_right() -> str | None:
    """Return what keeps this process from making hosts, in words for people, or None if it can."""
    if not sys.platform.startswith("linux"):
        return f"hosts are Linux network namespaces, and this is {sys.platform}"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    for tool, package in (("ip", "iproute2"), ("tc", "iproute2"), ("nft", "nftables")):
        if shutil.which(tool) is None:
            return f"there is no `{tool}` (Debian: {package})"
    return _refusal()


def can_make_hosts() -> bool:
    """Whether tests can have hosts of their own."""
    return missing_right() is None


def _refusal() -> str | None:
    # the kernel or a sandbox may refuse what root may elsewhere: only trying tells
    try:
        with Lan() as lan:
            lan.add_host().drop_packets(1)
    except ToolError as error:
        return f"the kernel refused: {error}"
    return None
