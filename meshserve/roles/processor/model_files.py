"""Where a processor has models' files from: this host's disk, by the hash of their contents, else the workers that offer them.

The disk is a convenience: whatever fails there, the mesh has the files.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from meshserve.errors import DeadlineExceeded, MeshserveError
from meshserve.mesh.files import fetch_file
from meshserve.mesh.mesh import Mesh
from meshserve.wire.card import ModelFile

_log = logging.getLogger(__name__)

FETCH_TIMEOUT_S = 120.0
"""For one file: 64 MB at half a megabyte a second. Lower gives up on slow links, higher keeps requests waiting for a stalled worker."""

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
    """Files on this host's disk. Blocks while it reads and writes, so threads call it. Never raises; says once
    what it could not keep.
    """

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
            where = f" in {self._directory}" if self._directory else ""
            words = "models' tokenizers cannot be kept%s (%s): they are fetched again at the next start"
            if not self._has_complained:
                _log.warning(words, where, error.strerror or error)
            self._has_complained = True

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


class ModelFiles:
    """Each file is fetched once, however many models and requests wait for it."""

    def __init__(self, mesh: Mesh, cache: FileCache) -> None:
        self._mesh, self._cache = mesh, cache
        self._fetching: dict[str, asyncio.Task[bytes | MeshserveError]] = {}
        self._turn = asyncio.Semaphore(2)
        """Files that are fetched at a time: what all others wait for is shared memory and link."""

    async def get(self, files: Sequence[ModelFile]) -> dict[str, bytes]:
        """The contents by name, each what its hash says. Raises TokenizerFailed or DeadlineExceeded if one cannot be had."""
        return {file.name: await self._get_one(file) for file in files}

    async def _get_one(self, file: ModelFile) -> bytes:
        task = self._fetching.get(file.sha256)
        if task is None:
            task = self._fetching[file.sha256] = self._mesh.tasks.spawn(self._obtain(file))
            task.add_done_callback(lambda done: self._fetching.pop(file.sha256, None))
        found = await asyncio.shield(task)
        if isinstance(found, MeshserveError):
            raise found
        return found

    async def _obtain(self, file: ModelFile) -> bytes | MeshserveError:
        """An error is returned, not raised: if nothing waits for this task, its error must not be reported."""
        async with self._turn:
            cached = await asyncio.to_thread(self._cache.load, file)
            if cached is not None:
                self._mesh.counters.add("model_files_from_cache")
                return cached
            try:
                async with asyncio.timeout(FETCH_TIMEOUT_S):
                    data = await fetch_file(self._mesh, file.sha256, file.size_bytes, lambda: self._sources(file))
            except TimeoutError:
                return DeadlineExceeded(f"{file.name} did not come within {FETCH_TIMEOUT_S:g} s")
            except MeshserveError as error:
                return error
            self._mesh.counters.add("model_files_fetched")
            await asyncio.to_thread(self._cache.store, file, data)
            return data

    def _sources(self, file: ModelFile) -> list[str]:
        """Workers whose card names this very file; this peer itself first, if it is one."""
        workers = {info.incarnation: info for role in ("decode", "prefill") for info in self._mesh.peers_with(role)}
        return [
            peer for peer, info in workers.items() if info.card is not None and file.sha256 in {known.sha256 for known in info.card.files}
        ]
