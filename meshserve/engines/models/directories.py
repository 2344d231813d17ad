"""Where fetched models are kept, and how processes on one machine share that place."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

Say = Callable[[str], None]
"""Gets a line for people."""

OVERRIDE = "MESHSERVE_MODELS_DIR"
_PART = "part-"


def places() -> list[Path]:
    """Folders for models, best first: the one in the environment alone, else the user's cache directory, else a temporary folder."""
    if configured := os.environ.get(OVERRIDE):
        return [Path(configured)]
    found = []
    base = os.environ.get("XDG_CACHE_HOME", "")
    with contextlib.suppress(RuntimeError):  # no home
        found.append((Path(base) if base.startswith("/") else Path.home() / ".cache") / "meshserve" / "models")
    if (temporary := _temporary()) is not None:
        found.append(temporary / f"meshserve-{os.getuid()}")
    return found


def _temporary() -> Path | None:
    """The folder for temporary files; None where none can be written."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return None


def prepare(directory: Path) -> None:
    """Make the folder, for this user alone. Raises OSError where that cannot be done, or where others could change what is in it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat(follow_symlinks=False)
    is_own = found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode)
    if directory.parent == _temporary() and not is_own:
        raise PermissionError(errno.EACCES, "another user made this folder")
    if not os.access(directory, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def need_space(directory: Path, num_bytes: int) -> None:
    """Raises OSError (ENOSPC) where fewer bytes are free: better than a download that fails at its end."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < num_bytes:
        raise OSError(errno.ENOSPC, f"{num_bytes / 1e6:,.0f} MB are needed and {free_bytes / 1e6:,.0f} MB are free")


@contextlib.contextmanager
def held(directory: Path, say: Say) -> Iterator[None]:
    """One process at a time fetches into this folder; `say` hears of it if this one has to wait.

    The lock only spares a second download: files come into the folder by a rename, so they are whole without it.
    """
    with (directory / "lock").open("a") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process fetches a model into this folder; waiting for it")
            fcntl.flock(opened, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield


@contextlib.contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A folder beside the models for what is half done. What a killed process left goes first: whoever holds the lock is alone here."""
    for left in directory.glob(f"{_PART}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_PART, dir=directory) as made:
        yield Path(made)


def sha256_of(path: Path) -> str:
    """Of a file's contents, in hexadecimal digits. Raises OSError."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
