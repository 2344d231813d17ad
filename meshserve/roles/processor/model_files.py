"""Where a processor has models' files from: this host's disk, else the workers that offer them."""

import asyncio
from collections.abc import Sequence

from meshserve.errors import DeadlineExceeded, MeshserveError
from meshserve.mesh.files import fetch_file
from meshserve.mesh.mesh import Mesh
from meshserve.roles.processor.file_cache import FileCache
from meshserve.wire.card import ModelFile

FETCH_TIMEOUT_S = 120.0
"""For one file: 64 MB at half a megabyte a second. Lower gives up on slow links, higher keeps requests waiting for a stalled worker."""


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
        """An error is the result for all who wait, and for nobody if none does."""
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
