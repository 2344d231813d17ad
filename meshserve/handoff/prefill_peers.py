"""What a decode worker knows of the prefill peers that could take a prompt, and in which order they are asked."""

import logging

from meshserve.engines.protocol import Engine
from meshserve.mesh.mesh import Mesh
from meshserve.wire.generation import GenerateRequest
from meshserve.wire.hello import PeerInfo

_log = logging.getLogger(__name__)


class PrefillPeers:
    """Answers by the mesh, and by what the router said in the request."""

    def __init__(self, mesh: Mesh, engine: Engine) -> None:
        self._mesh, self._engine = mesh, engine

    def candidates(self, request: GenerateRequest) -> list[str]:
        """Prefill peers that could take this prompt, best first: as the router ranked them, then others. Empty: prefill locally."""
        own, layout = self._mesh.incarnation, self._engine.kv_layout
        able = [info.incarnation for info in self._mesh.peers_with("prefill") if layout.accepts(info.layout) and info.incarnation != own]
        ranked = [peer for peer, _, _ in request.prefill_peers if peer in able]
        return ranked + [peer for peer in able if peer not in ranked]

    def ready_ms(self, request: GenerateRequest) -> float:
        """Until the best prefill peer that the router named has computed this prompt's KV; 0 if the router did not say."""
        for (peer, _, _), ready_ms in zip(request.prefill_peers, request.prefill_ms, strict=False):
            if peer != self._mesh.incarnation:
                return ready_ms
        return 0.0

    def num_queued(self, peer: str, request: GenerateRequest, num_outstanding: int) -> int:
        """Prompts ahead of this one, as far as is known: what the router heard of that peer, and what this worker has out itself."""
        return sum([queued for ranked, queued, _ in request.prefill_peers if ranked == peer]) + num_outstanding

    def num_preferred(self, candidates: list[str], request: GenerateRequest, num_outstanding: int) -> int:
        """How many are asked at first: the best if a router knows it to be idle; else all that have as much of the prompt.

        The first one free gets it then. (Asking one that was busy after all cost the hedge time in one of ten prompts at 80 % load.)
        """
        overlaps = {peer: overlap_blocks for peer, _, overlap_blocks in request.prefill_peers}
        best = candidates[0]
        if best in overlaps and not self.num_queued(best, request, num_outstanding):
            return 1
        have = overlaps.get(best, 0)
        return next((rank for rank, peer in enumerate(candidates) if overlaps.get(peer, 0) != have), len(candidates))

    def say_if_unlike(self, info: PeerInfo) -> None:
        """Log a prefill worker of the same model that can never help: people see two workers, and no handoff."""
        own, other, card = self._engine.kv_layout, info.layout, self._engine.card
        if info.card is None or info.card.model_hash != card.model_hash or other is None:
            return
        if own.can_hand_over and other.can_hand_over and not own.accepts(other):
            text = "%s keeps its KV in another way: no prompt is handed over to it; give both the same --kv-type and version"
            _log.warning(text, info.name)
