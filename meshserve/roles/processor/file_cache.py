"""Files of models on this host's disk, by the hash of their contents. A convenience: whatever fails here, the mesh has them."""

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from meshserve.wire.card import ModelFile

_log = logging.getLogger(__name__)

MAX_CACHE_BYTES = 1024 * 1024 * 1024
"""Beyond it the files that were not used for longest go. Higher costs disk, lower fetches again."""


def cache_directory() -> Path | None:
    """`meshserve/files` in the user's cache directory (XDG Base Directory Specification); None if this user has no place for one."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    with contextlib.suppress(RuntimeError):  # no home
        base = Path(configured) if configured.startswith("/") else Path.home() / ".cache"
        return base / "meshserve" / "files"
    return None


class FileCache:
    """Blocks while it reads and writes: for threads. Never raises; says once what it could not keep."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._has_complained = False

    def load(self, file: ModelFile) -> bytes | None:
        """The contents, checked; None if they are not here. What is damaged is removed."""
        if self._directory is None:
            return None
        path = self._directory / file.sha256
        try:
            with path.open("rb") as opened:
                data = opened.read(file.size_bytes + 1)
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() == file.sha256:
            with contextlib.suppress(OSError):
                os.utime(path)  # used just now
            return data
        _log.warning("%s was damaged; its contents are fetched again", path)
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def store(self, file: ModelFile, data: bytes) -> None:
        """Keep them. A reader sees all of a file or nothing, also after a crash in the middle."""
        try:
            if self._directory is None:
                raise OSError("there is no home directory")
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_room(self._directory, len(data))
            _write(self._directory, file.sha256, data)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._has_complained:
            self._has_complained = True
            where = f" in {self._directory}" if self._directory else ""
            _log.warning(
                "models' tokenizers cannot be kept%s (%s): they are fetched again at the next start", where, error.strerror or error
            )

    def _make_room(self, directory: Path, num_bytes: int) -> None:
        """Remove what was used longest ago; what a crash has left half written is a file like any other."""
        found = sorted(_sizes(directory))
        total = num_bytes + sum(size for _, size, _ in found)
        for _, size, path in found:
            if total <= MAX_CACHE_BYTES:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


def _sizes(directory: Path) -> Iterator[tuple[float, int, Path]]:
    """When each file was last used, its length and its path; other peers on this host may remove some meanwhile."""
    for path in list(directory.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            yield status.st_mtime, status.st_size, path


def _write(directory: Path, name: str, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix="part-", dir=directory)
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        Path(temporary).replace(directory / name)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
