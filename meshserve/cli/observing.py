"""Commands that look at a mesh from outside: observers, which are listed nowhere."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from meshserve.config import MeshConfig
from meshserve.errors import StartupFailed
from meshserve.mesh.mesh import Mesh

FIND_TIMEOUT_S = 3.0
_CHECK_S = 0.01


@asynccontextmanager
async def observer(config: MeshConfig) -> AsyncIterator[Mesh]:
    """A mesh to look at, joined without a role."""
    mesh = Mesh(config)
    await mesh.start()
    try:
        await mesh.join()
        yield mesh
    finally:
        await mesh.close()


async def wait_for(mesh: Mesh, condition: Callable[[], bool], what: str) -> None:
    """Raises StartupFailed, with why others could not be joined, if the condition does not come true in time."""
    try:
        async with asyncio.timeout(FIND_TIMEOUT_S):
            while not condition():
                await asyncio.sleep(_CHECK_S)
    except TimeoutError as error:
        reasons = "; ".join(sorted(set(mesh.links.refused.values())))
        raise StartupFailed(
            f"{what} in mesh {mesh.own.mesh!r}{f' ({reasons})' if reasons else ''}; try --peer HOST with the address of one"
        ) from error
