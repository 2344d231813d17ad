"""What the engines of one user take of this host, in a locked file, so that each leaves the others their part."""

import contextlib
import fcntl
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

_LOCK_TRIES, _LOCK_PAUSE_S = 50, 0.01
_MOST_LETTERS = 1 << 20
_serials = itertools.count()
_log = logging.getLogger(__name__)


class Share(NamedTuple):
    """What one engine takes, or several together."""

    pending_bytes: int
    """Memory that is claimed and not allocated yet: what is allocated the system itself no longer counts as available."""
    threads: int


class Claim:
    """One engine's entry in the file, which counts until its process ends. Where there can be no file, the engine goes without."""

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._is_kept = path or _usual_path(), False
        self._key = f"{os.getpid()}/{_birth(os.getpid())}/{next(_serials)}"

    def make(self, decide: Callable[[Share], Share]) -> Share:
        """Claim what `decide` returns, given what the others claim. What it raises passes, and nothing is claimed then.

        The file is locked meanwhile: of two engines that start at once, the second one knows what the first took.
        """
        share = None
        try:
            with _locked(self._path) as file:
                claims = _living(file)
                share = decide(Share(*map(sum, zip((0, 0), *claims.values(), strict=True))))
                _write(file, {**claims, self._key: share})
                self._is_kept = True
        except OSError as error:
            _log.warning("%s: %s; engines on this host do not know of each other's memory and threads", self._path, error.strerror)
        return share or decide(Share(0, 0))

    def update(self, share: Share | None) -> None:
        """Claim this instead; None leaves all to others."""
        with contextlib.suppress(OSError):
            if self._is_kept:
                with _locked(self._path) as file:
                    claims = {key: found for key, found in _living(file).items() if key != self._key}
                    _write(file, {**claims, self._key: share} if share else claims)


def _usual_path() -> Path:
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime, "meshserve-claims")
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError:  # none can be written, as in a read-only container: opening the file says why
        temporary = "/tmp"
    return Path(temporary, f"meshserve-claims-{os.getuid()}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """Raises OSError where the file cannot be had, is another user's, or is held for too long."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600), "r+") as file:
        if os.fstat(file.fileno()).st_uid != os.getuid():
            raise PermissionError(0, "the file is another user's")
        for tries_left in reversed(range(_LOCK_TRIES)):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not tries_left:
                    raise TimeoutError(0, "the process that holds its lock hangs") from None
                time.sleep(_LOCK_PAUSE_S)
        yield file


def _living(file: IO[str]) -> dict[str, Share]:
    """The claims of processes that are there; a file that was not written to its end holds none."""
    with contextlib.suppress(ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError):
        claims = {key: Share(int(pending), int(threads)) for key, (pending, threads) in json.loads(file.read(_MOST_LETTERS)).items()}
        return {key: share for key, share in claims.items() if _birth(int(key.split("/")[0])) == key.split("/")[1]}
    return {}


def _write(file: IO[str], claims: dict[str, Share]) -> None:
    file.seek(0)
    file.truncate()
    json.dump(claims, file)
    file.flush()


def _birth(pid: int) -> str:
    """When the process started, in ticks: its number may be used again. "" once it has ended, "-" where nobody says when it started."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        return fields[18] if state != "Z" else ""
    except OSError:
        with contextlib.suppress(OSError):
            os.kill(pid, 0)
            return "-" if not Path("/proc").exists() else ""
    return ""
