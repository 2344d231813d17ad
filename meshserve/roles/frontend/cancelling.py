"""Requests that are under way, by the mesh's name and the client's, and their end at a word from outside: anywhere in the mesh."""

import asyncio
from itertools import islice
from typing import Any, Protocol

from meshserve.errors import Cancelled, InvalidRequest, MeshserveError, RequestNotFound
from meshserve.mesh.mesh import Mesh
from meshserve.wire.messages import CANCEL_AT_PROCESSOR, CANCEL_REQUEST, FIND_REQUESTS, IS_TAKEN, Method

_TIMEOUT_S = 2.0
_MAX_FOUND = 16


class Stoppable(Protocol):
    """A request that is under way."""

    @property
    def client_id(self) -> str:
        """The client's label."""

    @property
    def processor(self) -> str | None:
        """Incarnation of the processor that has it now."""

    def stop(self, error: MeshserveError) -> None:
        """Cancel it at every hop, and tell its client the error."""

    def processor_suspected(self) -> None:
        """Its processor is silent, and another one is there."""


class UnderWay:
    """This frontend's requests, and a way to those of others."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.open: dict[str, Stoppable] = {}
        """By the mesh's name."""
        mesh.gauges.derive("cancellable", lambda: len(self.open))
        mesh.serve(FIND_REQUESTS, lambda call: call.end(self._found(call.body)))
        mesh.serve(CANCEL_REQUEST, lambda call: call.end(self._stop(call.body)))

    def _found(self, name: str) -> list[str]:
        """All are looked through for a label: cancelling is rare, and requests pay for no second index."""
        labelled = (request_id for request_id, found in self.open.items() if found.client_id == name)
        return [name] if name in self.open else list(islice(labelled, _MAX_FOUND))

    def _stop(self, request_id: str) -> bool:
        if request_id not in self.open:
            return False
        self.open[request_id].stop(Cancelled("this request was cancelled"))
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

    async def is_taken(self, processor: str, request_id: str) -> bool:
        """Whether a worker has the request. False where nobody can say."""
        return bool(await self._ask(processor, IS_TAKEN, request_id))

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
