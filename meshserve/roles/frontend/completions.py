"""What all requests for completions of a frontend share."""

import asyncio
import itertools
from typing import TYPE_CHECKING

from meshserve.config import ServeConfig
from meshserve.errors import NoWorker
from meshserve.mesh.mesh import Mesh
from meshserve.observe.receipt_store import FrontendReceipts
from meshserve.roles.frontend.admission_slots import AdmissionSlots
from meshserve.roles.frontend.cancelling import UnderWay

if TYPE_CHECKING:
    from meshserve.observe.otlp import Exporter


class Completions:
    """The way to processors, the admission slots, and what is kept of requests."""

    def __init__(self, mesh: Mesh, config: ServeConfig, exporter: "Exporter | None" = None) -> None:
        self.mesh, self.config, self.exporter = mesh, config, exporter
        self.loop = asyncio.get_running_loop()
        self.slots = AdmissionSlots(mesh, config.frontend)
        self.under_way = UnderWay(mesh)
        self.receipts = FrontendReceipts(mesh, config.receipts_kept) if config.observe else None
        self.num_open = 0
        """Requests under way."""
        self._ids = itertools.count(1)
        self._turn = itertools.count()
        mesh.gauges.derive("http_requests", lambda: self.num_open)

    def first_model(self) -> str:
        """For requests that name none. Raises NoWorker if there is none."""
        infos = self.mesh.peers_with("decode") or self.mesh.silent_peers_with("decode")
        cards = [info.card.model for info in infos if info.card is not None]
        if not cards:
            raise NoWorker("no decode worker is in the mesh yet")
        return cards[0]

    def new_id(self) -> str:
        """The mesh's name for another request."""
        return f"{self.mesh.incarnation}-{next(self._ids)}"

    def processor(self) -> str:
        """This peer itself if it can, else each in turn. Raises NoWorker."""
        able = self.mesh.peers_with("processor")
        if not able:
            raise NoWorker("no processor is in the mesh yet", role="processor")
        if able[0].incarnation == self.mesh.incarnation:
            return self.mesh.incarnation
        return able[next(self._turn) % len(able)].incarnation

    def close(self) -> None:
        """No more slots for any request."""
        self.slots.close()
