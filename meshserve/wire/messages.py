"""Every method of the mesh: its name, the type of its body, of the items of its stream, and of the answer at the stream's end.

Messages outside of streams: the hello (:mod:`meshserve.wire.hello`), tickets and what goes with KV blocks
(:mod:`meshserve.wire.handoff`), and the frames of the call sockets (:mod:`meshserve.wire.frames`).

A peer opens a stream with :meth:`meshserve.mesh.mesh.Mesh.open`; another peer serves it with
:meth:`meshserve.mesh.mesh.Mesh.serve`. Between roles of one peer messages go as objects. From another peer
they are read, and a malformed one ends the stream in a ProtocolError that names the place.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from meshserve.wire.card import FilePartRequest
from meshserve.wire.completion import CompletionRequest, DetokenizeRequest, Ending, Tokenized, TokenizeRequest
from meshserve.wire.generation import GenerateRequest, GenerationEnd
from meshserve.wire.handoff import Claim, Grant, Renewal
from meshserve.wire.hello import NetworkView, PortKnocks
from meshserve.wire.kept import KeptName
from meshserve.wire.observing import FeedBatch, PeerStatus
from meshserve.wire.routing import InFlightReservation, RouteRequest, RoutingDecision, WorkerLoad, WorkerReport
from meshserve.wire.structs import Meta

MAX_ECHO_BYTES = 65_536
RequestName = Annotated[str, Meta(min_length=1, max_length=256)]
"""The mesh's own name of a request, or the client's label."""


MAX_ASKED = 1024
_AskedNames = Annotated[list[RequestName], Meta(max_length=MAX_ASKED)]
_Overdue = Annotated[list[Annotated[float, Meta(ge=0, le=1e9)] | None], Meta(max_length=MAX_ASKED)]


@dataclass(frozen=True, slots=True)
class Method:
    """A kind of request stream. A type is a struct or a type of plain data; None: there is none, or the receiver
    reads the plain data."""

    name: str
    body: Any = None
    item: Any = None
    """Of each item, in watches and claims. The modules of `GENERATE` and `COMPLETE` describe theirs."""
    answer: Any = None


# --- requests on their way

COMPLETE = Method("complete", CompletionRequest, answer=Ending)
"""A frontend asks a processor; items are described in :mod:`meshserve.wire.completion`."""
ROUTE = Method("route", RouteRequest, answer=RoutingDecision)
"""A processor asks a router which worker is best for a prompt."""
GENERATE = Method("generate", GenerateRequest, answer=GenerationEnd)
"""A processor asks a decode worker; items are described in :mod:`meshserve.wire.generation`."""
PROGRESS = Method("generate.progress", _AskedNames, answer=_Overdue)
"""A processor asks a decode worker about sequences that get no tokens: for how many seconds the progress of each is overdue by the
worker's own expectation; None for one that the worker does not have."""
CLAIM = Method("prefill.claim", Claim, item=Grant)
"""A prefill worker asks the decode worker of a ticket, which ends the stream when it has all blocks."""
RENEW = Method("prefill.renew", Renewal)
"""A prefill worker names the attempts that make progress, so that their leases go on."""
STRIKE = Method("prefill.strike", str)
"""A decode worker tells a prefill worker that the ticket of this request is void."""
TOKENIZE = Method("tokenize", TokenizeRequest, answer=Tokenized)
DETOKENIZE = Method("detokenize", DetokenizeRequest, answer=str)

# --- requests by name

FIND_REQUESTS = Method("requests.find", RequestName, answer=list[str])
"""A frontend answers with the ids of its requests that have this id, or this label of their client."""
CANCEL_REQUEST = Method("requests.cancel", RequestName, answer=bool)
"""A frontend ends a request; False: it is not there."""
CANCEL_AT_PROCESSOR = Method("processor.cancel", RequestName, answer=bool)
IS_TAKEN = Method("processor.is_taken", RequestName, answer=bool)
"""A frontend asks a processor whether a worker has one of the request's sequences."""
HAS_SEQUENCE = Method("worker.has", RequestName, answer=bool)
"""A processor asks a decode worker whether it has accepted this sequence and not ended it."""
RECEIPT = Method("receipts.find", RequestName, answer=dict[str, Any] | None)
LATEST_RECEIPT = Method("receipts.latest", answer=dict[str, Any] | None)
RECENT_RECEIPTS = Method("receipts.recent", answer=list[tuple[str, float]])
"""Names of requests, the latest first, and how many seconds ago each ended."""
FRONTEND_RECEIPT = Method("receipts.frontend", RequestName, answer=dict[str, Any] | None)
"""A frontend's part of a receipt: `processor`, `frontend`, and `receipt`, which is what a frontend alone knows."""
KEPT_RESPONSE = Method("responses.find", KeptName, answer=bytes | None)
"""A processor gives the response that it keeps under this name, as :class:`meshserve.wire.kept.KeptResponse` packs it."""
FORGET_RESPONSE = Method("responses.forget", KeptName, answer=bool)
"""A processor keeps it no longer; False: the processor did not have it."""

# --- state that others follow

WORKER_REPORTS = Method("worker.watch", item=WorkerReport)
WORKER_LOADS = Method("worker.load", item=WorkerLoad)
"""The load alone, for frontends, which only ask how many more requests there is room for."""
IN_FLIGHT = Method("router.in_flight", item=InFlightReservation)
"""What a router sends out, for the other routers."""
FEED = Method("feed.watch", item=FeedBatch)

# --- about peers

FILE_PART = Method("model.file", FilePartRequest, answer=bytes)
STATUS = Method("mesh.status", answer=PeerStatus)
REACH = Method("mesh.reach", answer=PortKnocks)
VIEW = Method("mesh.view", answer=NetworkView)
ECHO = Method("mesh.echo", Annotated[bytes, Meta(max_length=MAX_ECHO_BYTES)], answer=bytes)
