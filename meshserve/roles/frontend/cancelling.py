"""Requests that are under way, by the mesh's name and the client's, and their end at a word from outside: anywhere in the mesh."""

import asyncio
from collections.abc import Callable
from typing import Any

from meshserve.errors import Cancelled, InvalidRequest, MeshserveError, RequestNotFound
from meshserve.mesh.mesh import Mesh
from meshserve.wire.messages import CANCEL_AT_PROCESSOR, CANCEL_REQUEST, FIND_REQUESTS, Method

_TIMEOUT_S = 2.0
_MAX_FOUND = 16


class UnderWay:
    """This frontend's requests, and a way to those of others."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._stops: dict[str, Callable[[MeshserveError], None]] = {}
        self._labels: dict[str, list[str]] = {}
        mesh.gauges.derive("cancellable", lambda: len(self._stops) + len(self._labels))
        mesh.serve(FIND_REQUESTS, lambda call: call.end(self._found(call.body)))
        mesh.serve(CANCEL_REQUEST, lambda call: call.end(self._stop(call.body)))

    def add(self, request_id: str, label: str, stop: Callable[[MeshserveError], None]) -> None:
        """A request begins. `stop` cancels it at every hop, and tells its client the error."""
        self._stops[request_id] = stop
        if label:
            self._labels.setdefault(label, []).append(request_id)

    def remove(self, request_id: str, label: str) -> None:
        """It ended. Harmless if it never began."""
        if self._stops.pop(request_id, None) is not None and label:
            named = self._labels[label]
            named.remove(request_id)
            if not named:
                del self._labels[label]

    def _found(self, name: str) -> list[str]:
        return [name] if name in self._stops else self._labels.get(name, [])[:_MAX_FOUND]

    def _stop(self, request_id: str) -> bool:
        stop = self._stops.get(request_id)
        if stop is None:
            return False
        stop(Cancelled("this request was cancelled"))
        self._mesh.counters.add("requests_cancelled")
        return True

    async def cancel(self, name: str) -> str:
        """End the one request of this name, wherever it is, and return its id.

        Raises RequestNotFound if there is none, InvalidRequest if a label names several.
        """
        owner = name.partition("-")[0]
        if self._stop(name) or await self._ask_owner(owner, name):
            return name
        found = await self._find(name)
        if len(found) > 1:
            raise InvalidRequest(f"{len(found)} requests are called {name!r}: use their ids, {', '.join(sorted(found))}", param="id")
        for request_id, peer in found.items():
            if await self._ask(peer, CANCEL_REQUEST, request_id):
                return request_id
        raise RequestNotFound(f"no request {name!r} is under way", param="id")

    async def _ask_owner(self, owner: str, name: str) -> bool:
        """The frontend that took it in; for a request that came without one, the processor that has it."""
        info = self._mesh.info_of(owner)
        if info is not None and "frontend" in info.roles:
            return owner != self._mesh.incarnation and bool(await self._ask(owner, CANCEL_REQUEST, name))
        processors = [info.incarnation for info in self._mesh.peers_with("processor")]
        return any(await asyncio.gather(*(self._ask(peer, CANCEL_AT_PROCESSOR, name) for peer in processors)))

    async def _find(self, label: str) -> dict[str, str]:
        """Ids of the requests with this label, and where they are."""
        frontends = [info.incarnation for info in self._mesh.peers_with("frontend")]
        if self._mesh.incarnation not in frontends:
            frontends.append(self._mesh.incarnation)  # one that drains still has requests
        answers = await asyncio.gather(*(self._ask(peer, FIND_REQUESTS, label) for peer in frontends))
        pairs = zip(frontends, answers, strict=True)
        return {item: peer for peer, items in pairs for item in (items or ())[:_MAX_FOUND]}

    async def _ask(self, peer: str, method: Method, name: str) -> Any:
        """None from a peer that is lost or does not answer."""
        try:
            return await self._mesh.call(peer, method, name, _TIMEOUT_S)
        except MeshserveError:
            return None
