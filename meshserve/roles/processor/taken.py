"""Whether a worker has a request: asked for the rare one that waits long for its first token, so
that no other pays for a worker's word.
"""

from collections.abc import Iterable
from contextlib import suppress

from meshserve.errors import MeshserveError
from meshserve.mesh.mesh import Mesh
from meshserve.wire.messages import HAS_SEQUENCE

_TIMEOUT_S = 2.0
"""For a worker to say whether it has a sequence."""


async def is_taken(mesh: Mesh, sequences: Iterable[tuple[str | None, str]]) -> bool:
    """Whether the first of these sequences that was sent to a worker is there. Each is its worker,
    None without one, and its name.
    """
    for worker, name in sequences:
        if worker is not None:
            with suppress(MeshserveError):
                return bool(await mesh.call(worker, HAS_SEQUENCE, name, _TIMEOUT_S))
    return False
