"""The Responses API's routes for kept responses, and requests that refer to them. Any frontend finds what a processor keeps."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar
from urllib.parse import parse_qs

from meshserve.errors import InvalidRequest, MeshserveError, ProtocolError, ResponseNotFound
from meshserve.mesh.mesh import Mesh
from meshserve.roles.frontend.completions import Completions
from meshserve.roles.frontend.exchange import Exchange
from meshserve.roles.frontend.http.connection import Connection
from meshserve.roles.frontend.http.messages import Request, Response
from meshserve.roles.frontend.kept_items import before, input_items, items_of, name_in, name_of, response_of
from meshserve.roles.frontend.models.common import Parsed
from meshserve.roles.frontend.models.reading import check_json, read_json, read_object
from meshserve.roles.frontend.models.responses import NOTHING, REFERENCE, Before, parse_response, references
from meshserve.roles.frontend.routes import Routes, json_response
from meshserve.roles.frontend.writers import Api
from meshserve.wire.kept import KeptName, KeptResponse, unpacked
from meshserve.wire.messages import FORGET_RESPONSE, KEPT_RESPONSE, Method

_Found = TypeVar("_Found")
_TIMEOUT_S = 2.0
_MARKS = (b'"previous_response_id"', b'"%b"' % REFERENCE.encode())
"""A body that refers to a kept response has one of them."""
_MAX_REFERENCES = 256
_MAX_NAME = 256
MAX_LISTED, _LISTED = 100, 20
ORDERS = ("asc", "desc")


class KeptResponses:
    """Finds the responses that processors keep."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def add_routes(self, routes: Routes) -> None:
        """Add the routes to the frontend's table."""
        routes.add_async("GET", "/v1/responses/{name}", self._show)
        routes.add_async("DELETE", "/v1/responses/{name}", self._forget)
        routes.add_async("GET", "/v1/responses/{name}/input_items", self._list_input)

    # --- routes

    async def _show(self, http: Request) -> Response:
        if _query(http).get("stream") == "true":
            raise InvalidRequest("stream: a response that is kept is given as a whole", param="stream")
        kept = await self._kept(http)
        return json_response(await asyncio.to_thread(response_of, kept))

    async def _forget(self, http: Request) -> Response:
        asked = KeptName(name_of(http.name), http.owner)
        answers = await asyncio.gather(*(self._ask(peer, FORGET_RESPONSE, asked) for peer in self._processors(asked)))
        if not any(answers):
            raise _not_found(http.name)
        return json_response({"id": http.name, "object": "response", "deleted": True})

    async def _list_input(self, http: Request) -> Response:
        kept = await self._kept(http)
        return json_response(_page(await asyncio.to_thread(input_items, kept), _query(http)))

    # --- for requests that refer to something

    async def referred_to(self, http: Request) -> Before:
        """The kept data that the body refers to. Raises InvalidRequest if the body is no JSON object, or takes too long to parse."""
        previous, ids = references(await read_json(http.body, read_object))
        if len(ids) > _MAX_REFERENCES:
            raise InvalidRequest(f"input refers to more than {_MAX_REFERENCES} items", param="input")
        found = await self._find(KeptName(name_of(previous), http.owner)) if previous is not None else None
        names = {item_id: name for item_id in ids if (name := name_in(item_id)) is not None}
        wanted = list(dict.fromkeys(names.values()))
        kept = await asyncio.gather(*(self._find(KeptName(name, http.owner)) for name in wanted))
        responses = {name: each for name, each in zip(wanted, kept, strict=True) if each is not None}
        return await asyncio.to_thread(gathered, found, names, responses)

    # --- from processors

    async def _kept(self, http: Request) -> KeptResponse:
        found = await self._find(KeptName(name_of(http.name), http.owner))
        if found is None:
            raise _not_found(http.name)
        return found

    async def _find(self, asked: KeptName) -> KeptResponse | None:
        """The entry of the first processor that has it, without waiting for the others, as one may be silent."""

        async def ask(peer: str) -> KeptResponse | None:
            data = await self._ask(peer, KEPT_RESPONSE, asked)
            try:
                return None if data is None else await asyncio.to_thread(unpacked, data)
            except ProtocolError:
                return None

        return await first_found([ask(peer) for peer in self._processors(asked)])

    def _processors(self, asked: KeptName) -> list[str]:
        """The processors that may have a response of this name. Draining processors still have theirs."""
        infos = [self._mesh.own, *(member.info for member in self._mesh.links.membership.listed())]
        peers = [info.incarnation for info in infos if "processor" in info.roles]
        return peers if 0 < len(asked.name) <= _MAX_NAME else []

    async def _ask(self, peer: str, method: Method, asked: KeptName) -> Any:
        """None from a processor that is lost or does not answer."""
        try:
            return await self._mesh.call(peer, method, asked, _TIMEOUT_S)
        except MeshserveError:
            return None


async def first_found(asking: list[Coroutine[Any, Any, _Found | None]]) -> _Found | None:
    """The first result; the other calls are cancelled. None if there is no result."""
    tasks = [asyncio.ensure_future(each) for each in asking]
    try:
        for answer in asyncio.as_completed(tasks):
            if (found := await answer) is not None:
                return found
        return None
    finally:
        for task in tasks:
            task.cancel()


def gathered(found: KeptResponse | None, names: dict[str, str], responses: dict[str, KeptResponse]) -> Before:
    """The previous response and the items that were found. `names` has the response's name by the id of an item."""
    # once for each response: a request may refer to hundreds of items of a long one
    known = {name: items_of(kept) for name, kept in responses.items()}
    items = {item_id: item for item_id, name in names.items() if name in known and (item := known[name].get(item_id))}
    earlier = NOTHING if found is None else before(found)
    return Before(earlier.messages, earlier.output, items)


def _not_found(response_id: str) -> ResponseNotFound:
    return ResponseNotFound(f"Response with id {response_id!r:.80} not found.", param="response_id")


def _query(http: Request) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(http.query.decode("latin-1")).items()}


def _page(items: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
    """The items, latest first unless the query asks for another order."""
    order, limit = query.get("order", "desc"), query.get("limit", str(_LISTED))
    if order not in ORDERS:
        raise InvalidRequest("order must be asc or desc", param="order")
    if not limit.isascii() or not limit.isdecimal() or not 1 <= int(limit[:9]) <= MAX_LISTED:
        raise InvalidRequest(f"limit must be between 1 and {MAX_LISTED}", param="limit")
    listed = items if order == "asc" else items[::-1]
    if after := query.get("after"):
        places = [place for place, item in enumerate(listed) if item["id"] == after]
        if not places:
            raise InvalidRequest(f"after: there is no item {after!r:.80}", param="after")
        listed = listed[places[0] + 1 :]
    shown = listed[: int(limit)]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, **ends, "has_more": len(shown) < len(listed)}


class ResponseExchange(Exchange):
    """A request of the Responses API. The responses that it refers to are found first."""

    __slots__ = ("_kept",)

    def __init__(self, kept: KeptResponses, completions: Completions, api: Api, http: Request) -> None:
        super().__init__(completions, api, http)
        self._kept = kept

    def begin(self, connection: Connection) -> None:
        """Begin at once, or after a search if the body refers to a kept response."""
        if any(mark in self._http.body for mark in _MARKS):
            self._connection = connection
            self._completions.num_open += 1
            connection.run(self._begin_later())
        else:
            super().begin(connection)

    def _parse(self) -> Parsed:
        check_json(self._http.body)
        return self._parsed(NOTHING)

    def _parsed(self, before: Before) -> Parsed:
        receipt, created_s = self._receipt, int(time.time())
        request, options = parse_response(self._http.body, receipt.request_id, receipt.client_id, before, created_s)
        if request.keep is not None:
            request.keep.owner = self._http.owner
        return request, options

    async def _begin_later(self) -> None:
        try:
            before = await self._kept.referred_to(self._http)
            parsed = await asyncio.to_thread(self._parsed, before)
        except MeshserveError as error:
            self.refuse(error)
        except Exception:
            self._went_wrong()
        else:
            self.run(lambda: parsed)

