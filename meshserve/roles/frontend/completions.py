"""State that all completion requests of a frontend share."""

import asyncio
import itertools
import time
from typing import TYPE_CHECKING

from meshserve.config import ServeConfig
from meshserve.errors import DeadlineExceeded, Draining, MeshserveError, NoWorker, PeerLost
from meshserve.mesh.membership import Change, Member, PeerState
from meshserve.mesh.mesh import Mesh
from meshserve.observe.receipt_store import FrontendReceipts
from meshserve.roles.frontend.admission_slots import AdmissionSlots
from meshserve.roles.frontend.cancelling import UnderWay
from meshserve.roles.frontend.models.ollama import LATEST

if TYPE_CHECKING:
    from meshserve.observe.otlp import Exporter


class Completions:
    """Chooses processors, and holds admission slots, requests under way and receipts."""

    def __init__(self, mesh: Mesh, config: ServeConfig, exporter: "Exporter | None" = None) -> None:
        self.mesh, self.config, self.exporter = mesh, config, exporter
        self.loop = asyncio.get_running_loop()
        self.slots = AdmissionSlots(mesh, config.frontend)
        self.under_way = UnderWay(mesh)
        self.receipts = FrontendReceipts(mesh, config.receipts_kept) if config.observe else None
        self.num_open = 0
        """Number of requests under way."""
        self._ids = itertools.count(1)
        self._turn = itertools.count()
        mesh.gauges.derive("http_requests", lambda: self.num_open)
        mesh.subscribe(self._on_change)

    def first_model(self) -> str:
        """The model for requests that name none. Raises NoWorker if no model is served."""
        infos = self.mesh.peers_with("decode") or self.mesh.silent_peers_with("decode")
        cards = [info.card.model for info in infos if info.card is not None]
        if not cards:
            raise NoWorker("no decode worker is in the mesh yet")
        return cards[0]

    def served_name(self, name: str) -> str:
        """The name under which workers serve a model that a client of Ollama's API names: the tag `latest` may be missing, or
        be added to a name without a tag."""
        infos = [*self.mesh.peers_with("decode"), *self.mesh.silent_peers_with("decode")]
        cards = [info.card for info in infos if info.card is not None]
        others = (name, name.removesuffix(LATEST), name + LATEST)
        found = (other for other in others if any(card.is_called(other) for card in cards))
        return next(found, name)

    def new_id(self) -> str:
        """A new name for a request, unique in the mesh."""
        return f"{self.mesh.incarnation}-{next(self._ids)}"

    def processor(self, excluded: tuple[str, ...] = ()) -> str:
        """A processor: this peer if it is one, else each in turn, without those that are excluded. Raises NoWorker."""
        able = self.mesh.peers_with("processor")
        if excluded:
            able = [info for info in able if info.incarnation not in excluded]
        if not able:
            raise NoWorker("no processor is in the mesh yet", role="processor")
        if able[0].incarnation == self.mesh.incarnation:
            return self.mesh.incarnation
        return able[next(self._turn) % len(able)].incarnation

    def unreached(self, error: MeshserveError, deadline_s: float) -> MeshserveError:
        """The error of a request without a processor: this one, or that of a deadline that passed first."""
        is_late = time.monotonic() >= deadline_s
        return DeadlineExceeded("no processor was in reach before the request's deadline") if is_late else error

    def knows_another(self, processors: tuple[str, ...]) -> bool:
        """Whether there is a processor other than these."""
        return any(info.incarnation not in processors for info in self.mesh.peers_with("processor"))

    def is_lost(self, processor: str, error: MeshserveError) -> bool:
        """Whether a processor or its connection is lost, or the processor stops, by the error in which its stream ended. A processor
        that is still there reports the loss of a worker."""
        if isinstance(error, PeerLost):
            return error.peer == self.mesh.name_of(processor) or not self.mesh.is_linked(processor)
        return error.code == Draining.code

    def _on_change(self, change: Change, member: Member) -> None:
        if change in (Change.SUSPECTED, Change.RECOVERED, Change.CALLABLE) and "processor" in member.info.roles:
            self._leave_silent_processors()

    def _leave_silent_processors(self) -> None:
        """Have requests started over at other processors, if there are any, also where none was there when theirs fell silent."""
        silent = {member.info.incarnation for member in self.mesh.links.membership.listed() if member.state is PeerState.SUSPECT}
        if silent and self.mesh.peers_with("processor"):
            for request in list(self.under_way.open.values()):
                if request.processor in silent:
                    request.processor_suspected()

    def close(self) -> None:
        """Give no further admission slots."""
        self.slots.close()
