"""Responses that a processor keeps with their conversations, for later requests that refer to them. Bounded, and lost with the process."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

from meshserve.errors import MeshserveError
from meshserve.mesh.calls import IncomingCall
from meshserve.mesh.mesh import Mesh
from meshserve.wire.completion import CompletionRequest, Ending, Keep
from meshserve.wire.kept import MAX_KEPT_BYTES, KeptResponse, joined
from meshserve.wire.messages import FORGET_RESPONSE, KEPT_RESPONSE
from meshserve.wire.structs import replace

_NOTHING = None, None
_ENTRY_BYTES = 512
"""Bytes of an entry besides its data."""


class ResponseStore:
    """Data by name, up to a number of entries and of bytes: what was asked for longest ago goes first. Nothing is found but by
    its owner. Pure."""

    def __init__(self, max_entries: int = 0, max_bytes: int = 0) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._entries: OrderedDict[str, tuple[bytes, bytes]] = OrderedDict()
        self.size_bytes = 0
        """Of all entries, each its owner and its data."""

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, name: str, data: bytes, owner: bytes = b"") -> None:
        """One more, in place of what had this name. What is too long for the store is not kept."""
        self._drop(name)
        if len(data) + _ENTRY_BYTES > self._max_bytes:
            return
        self._entries[name] = owner, data
        self.size_bytes += len(data) + _ENTRY_BYTES
        while len(self._entries) > self._max_entries or self.size_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def find(self, name: str, owner: bytes = b"") -> bytes | None:
        """The data; None if the name is unknown, or belongs to another owner."""
        kept_for, data = self._entries.get(name, _NOTHING)
        if data is None or kept_for != owner:
            return None
        self._entries.move_to_end(name)
        return data

    def forget(self, name: str, owner: bytes = b"") -> bool:
        """Delete the data. Returns False if the name is unknown, or belongs to another owner."""
        is_there = self._entries.get(name, _NOTHING)[0] == owner
        if is_there:
            self._drop(name)
        return is_there

    def _drop(self, name: str) -> None:
        _, data = self._entries.pop(name, _NOTHING)
        if data is not None:
            self.size_bytes -= len(data) + _ENTRY_BYTES


class Recorded:
    """The call of a request whose answer is to be kept: what goes to the frontend is noted."""

    def __init__(self, call: IncomingCall, keep: Callable[[list[Any], Ending], None]) -> None:
        self._call, self._keep = call, keep
        self._items: list[Any] = []

    @property
    def deadline_s(self) -> float:
        """The call's."""
        return self._call.deadline_s

    @property
    def ended_by(self) -> str:
        """What ended the call, if not its handler."""
        return self._call.ended_by

    def send(self, item: Any) -> None:
        """Note it and send it."""
        self._items.append(item)
        self._call.send(item)

    def send_all(self, items: list[Any]) -> None:
        """Several at once."""
        self._items += items
        self._call.send_all(items)

    def end(self, ending: Ending) -> None:
        """Keep the answer before the client has its end, and may refer to it."""
        self._keep(self._items, ending)
        self._call.end(ending)

    def fail(self, error: MeshserveError) -> None:
        """A response that failed is not kept."""
        self._call.fail(error)


class KeptResponses:
    """A processor's store, and the way to it from other peers."""

    def __init__(self, mesh: Mesh, store: ResponseStore) -> None:
        self._store = store
        mesh.gauges.derive("responses_kept", lambda: len(store))
        mesh.gauges.derive("responses_kept_bytes", lambda: store.size_bytes)
        mesh.serve(KEPT_RESPONSE, lambda call: call.end(store.find(call.body.name, call.body.owner)))
        mesh.serve(FORGET_RESPONSE, lambda call: call.end(store.forget(call.body.name, call.body.owner)))

    def recorded(self, call: IncomingCall, asked: CompletionRequest, keep: Keep) -> Recorded:
        """The call, for its handler to use in the call's place."""
        return Recorded(call, partial(self._keep, asked, keep))

    def _keep(self, asked: CompletionRequest, keep: Keep, items: list[Any], ending: Ending) -> None:
        messages = (asked.messages or [])[keep.has_instructions :]
        ending = replace(ending, receipt=None)
        kept = KeptResponse(keep.name, asked.model, keep.created_s, keep.echoed, messages, joined(items), ending)
        data = kept.packed()
        if len(data) <= MAX_KEPT_BYTES:
            self._store.keep(keep.name.replace("-", ""), data, keep.owner)
