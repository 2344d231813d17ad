"""A request's receipt, wherever in the mesh it is: asked for by frontends and by observers."""

import asyncio
from collections.abc import Iterable
from operator import itemgetter
from typing import Any

from meshserve.errors import MeshserveError, RequestNotFound
from meshserve.mesh.mesh import Mesh
from meshserve.observe.receipt_store import MAX_RECENT
from meshserve.observe.receipts import PHASES, with_front
from meshserve.wire.messages import FRONT_OF_RECEIPT, LATEST_RECEIPT, RECEIPT, RECENT_RECEIPTS, Method

_TIMEOUT_S = 2.0
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "request_id": str,
    "client_id": str,
    "model": str,
    "policy": str,
    "peers": dict,
    "candidates": list,
    "tokens": dict,
    "kv": dict,
    "attempts": list,
    "outcome": str,
    "total_ms": (int, float),
    "phases_ms": dict,
    "ended_ago_s": (int, float),
}


async def find_receipt(mesh: Mesh, name: str) -> dict[str, Any]:
    """Of the request of this name, the mesh's or the client's own. Raises RequestNotFound.

    The mesh's name begins with the frontend that took the request in, and that one knows the processor. Without it, all processors
    are asked. Of what got to none, or to one that is gone, the frontend knows its own part.
    """
    front = await _front_of(mesh, name)
    known = [front["processor"]] if front is not None and front.get("processor") else _with_role(mesh, "processor")
    found = _latest(await _ask_all(mesh, known, RECEIPT, name))
    if found is None:
        fronts = [front] if front is not None else await _ask_all(mesh, _with_role(mesh, "frontend"), FRONT_OF_RECEIPT, name)
        found = _latest(answer.get("receipt") for answer in fronts if isinstance(answer, dict))
        if found is None:
            words = "it is still under way, or not among the last that are kept"
            raise RequestNotFound(f"no receipt of a request {name!r}: {words}", param="id")
    return await _completed(mesh, found, front)


async def latest_receipt(mesh: Mesh) -> dict[str, Any]:
    """Of the request that ended last. Raises RequestNotFound if none did."""
    found = _latest(await _ask_all(mesh, _with_role(mesh, "processor"), LATEST_RECEIPT, None))
    if found is None:
        raise RequestNotFound("no processor of this mesh has a receipt: nothing was asked yet, or they run with --no-observe", param="id")
    return await _completed(mesh, found, None)


async def recent_requests(mesh: Mesh) -> list[str]:
    """Names of those that ended last, the latest first; up to as many as one processor lists."""
    answers = await _ask_all(mesh, _with_role(mesh, "processor"), RECENT_RECEIPTS, None)
    entries = [entry for answer in answers for entry in (answer or ())[:MAX_RECENT]]
    return [name for name, _ in sorted(entries, key=itemgetter(1))][:MAX_RECENT]


async def _completed(mesh: Mesh, receipt: dict[str, Any], front: dict[str, Any] | None) -> dict[str, Any]:
    """With the part of the frontend that took it in, if there was one and it is still there."""
    if front is None:
        front = await _front_of(mesh, receipt["request_id"])
    part = front.get("front") if front is not None else None
    return with_front(receipt, part) if isinstance(part, dict) else receipt


async def _front_of(mesh: Mesh, request_id: str) -> dict[str, Any] | None:
    owner = mesh.info_of(request_id.partition("-")[0])
    if owner is None or "frontend" not in owner.roles:
        return None
    answer = await _ask(mesh, owner.incarnation, FRONT_OF_RECEIPT, request_id)
    return answer if isinstance(answer, dict) else None


def _with_role(mesh: Mesh, role: str) -> list[str]:
    """Draining ones too: they know what they knew."""
    own = [mesh.own] if role in mesh.own.roles else []
    infos = own + [member.info for member in mesh.links.membership.listed()]
    return [info.incarnation for info in infos if role in info.roles]


def _latest(answers: Iterable[Any]) -> dict[str, Any] | None:
    """By how long ago each says that it ended, on its own clock."""
    receipts = [answer for answer in answers if _is_receipt(answer)]
    return min(receipts, key=lambda receipt: float(receipt["ended_ago_s"]), default=None)


def _is_receipt(answer: Any) -> bool:
    """What others send is checked here, once, so that what is shown needs no doubts."""
    if not isinstance(answer, dict) or not all(isinstance(answer.get(name), kind) for name, kind in _FIELDS.items()):
        return False
    lists = [answer.get(name, []) for name in ("candidates", "prefill_candidates", "attempts", "choices")]
    if not all(isinstance(found, list) and all(isinstance(entry, dict) for entry in found) for found in lists):
        return False
    if not isinstance(answer.get("handoff"), (dict, type(None))):
        return False
    if not all(type(count) is int for count in (*answer["tokens"].values(), *answer["kv"].values())):
        return False
    phases = answer["phases_ms"]
    return isinstance(answer.get("traceparent"), str) and all(isinstance(phases.get(phase), (int, float)) for phase in PHASES)


async def _ask_all(mesh: Mesh, peers: list[str], method: Method, body: Any) -> list[Any]:
    return await asyncio.gather(*(_ask(mesh, peer, method, body) for peer in peers))


async def _ask(mesh: Mesh, peer: str, method: Method, body: Any) -> Any:
    """None from a peer that is lost, does not answer, or keeps nothing."""
    try:
        return await mesh.call(peer, method, body, _TIMEOUT_S)
    except MeshserveError:
        return None
