"""Commands that look at a mesh from outside: observers, which are listed nowhere."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from meshserve.config import MeshConfig
from meshserve.errors import StartupFailed
from meshserve.mesh.mesh import Mesh
from meshserve.wire.card import ModelCard

FIND_TIMEOUT_S = 3.0
_CHECK_S = 0.01


def observer(config: MeshConfig) -> AbstractAsyncContextManager[Mesh]:
    """A mesh to look at, joined without a role."""
    return joined(Mesh(config))


@asynccontextmanager
async def joined(mesh: Mesh) -> AsyncIterator[Mesh]:
    """A mesh that is started, joined, and closed at the end."""
    await mesh.start()
    try:
        await mesh.join()
        yield mesh
    finally:
        await mesh.close()


async def settle(mesh: Mesh, quiet_s: float = 0.3, give_up_s: float = FIND_TIMEOUT_S, least_s: float = 0.0) -> None:
    """Until no new peer was found for a moment, or nobody at all until it is time to give up."""
    began_s = last_s = mesh.now_s()
    num_known = 0
    while True:
        await asyncio.sleep(_CHECK_S)
        now_s = mesh.now_s()
        num_linked = sum(member.is_callable for member in mesh.links.membership.listed())
        if num_linked != num_known:
            num_known, last_s = num_linked, now_s
        is_quiet = num_known and now_s - last_s > quiet_s and now_s - began_s >= least_s
        if is_quiet or now_s - began_s > give_up_s:
            return


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


async def wait_for_workers(mesh: Mesh) -> list[ModelCard]:
    """The model cards of decode workers, once there are a processor and a decode worker. Raises StartupFailed if not in time."""
    able = mesh.peers_with
    await wait_for(mesh, lambda: bool(able("processor") and able("decode")), "found no processor and decode worker")
    return [info.card for info in able("decode") if info.card is not None]
