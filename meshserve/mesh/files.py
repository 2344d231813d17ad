"""Files that a peer offers to others, asked for by the hash of their contents, a part at a time.

The asking side sets the pace: whatever the file's length, one part of it is on its way, and tokens on the same link wait for no more
than that. So a part that fails is simply asked for again, elsewhere. Both ends are here.
"""

import asyncio
import hashlib
from collections.abc import Callable, Mapping

from meshserve.errors import InvalidRequest, MeshserveError, ProtocolError, TokenizerFailed
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.mesh import Mesh
from meshserve.wire.card import FilePartRequest
from meshserve.wire.messages import FILE_PART

PART_BYTES = 128 * 1024
"""Ten milliseconds of a link of 100 megabits. Higher delays what shares the link, lower costs round trips: 70 for 9 MB."""
_PART_TIMEOUT_S = 5.0


def offer_files(mesh: Mesh, files: Mapping[str, bytes]) -> None:
    """Give out these contents, by their SHA-256, a part at a time."""

    def answer(call: IncomingCall) -> None:
        part: FilePartRequest = call.body
        data = files.get(part.sha256)
        if data is None or part.offset > len(data):
            raise InvalidRequest("there is no such part of a file here")
        call.end(data[part.offset : part.offset + PART_BYTES])

    mesh.serve(FILE_PART, answer)


async def fetch_file(mesh: Mesh, sha256: str, size_bytes: int, sources: Callable[[], list[str]]) -> bytes:
    """The contents of this hash, checked, from the peers that `sources` names at the moment, one after the other.

    A peer that fails is asked no more, and the next goes on where it stopped; if the whole is not what the hash says, all that took
    part are left out, and it is begun anew. Ends when no peer is left: raises TokenizerFailed. The caller sets the deadline.
    """
    failed: set[str] = set()
    took_part: set[str] = set()
    reason = "no live worker offers it"
    data = bytearray()
    while source := next((peer for peer in sources() if peer not in failed), None):
        try:
            took_part.add(source)
            await _read_from(mesh, source, sha256, data, size_bytes)
        except MeshserveError as error:
            failed.add(source)
            reason = error.message
            continue
        whole = await asyncio.to_thread(bytes, data)
        if await asyncio.to_thread(_digest, whole) == sha256:
            return whole
        mesh.counters.add("model_files_refused")
        reason = "what came is not what the card says"
        failed |= took_part
        took_part.clear()
        data.clear()
    raise TokenizerFailed(f"a file of the model could not be fetched: {reason}")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def _read_from(mesh: Mesh, source: str, sha256: str, data: bytearray, size_bytes: int) -> None:
    """Append what is missing. Raises the MeshserveError that ended it."""
    while len(data) < size_bytes:
        part: bytes = await mesh.call(source, FILE_PART, FilePartRequest(sha256, len(data)), _PART_TIMEOUT_S)
        if not 0 < len(part) <= min(PART_BYTES, size_bytes - len(data)):
            raise ProtocolError("a worker gave out a part of another length")
        data += part
        mesh.counters.add("model_file_bytes_fetched", len(part))
