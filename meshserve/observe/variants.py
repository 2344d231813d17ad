"""Models of one name that are not one model: workers whose weights or KV layouts differ. For people; a name leads to one of the
models (`peers_serving`), NAME#HASH to each. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshserve.wire.card import short
from meshserve.wire.hello import PeerInfo


@dataclass(frozen=True, slots=True)
class Serving:
    """What one worker serves."""

    label: str
    """The worker's name, for people."""
    names: tuple[str, ...]
    model_hash: str
    layout: str
    """Fingerprint of its KV layout."""


def serving(label: str, info: PeerInfo) -> Serving | None:
    """None if this peer serves no model."""
    if info.card is None or info.layout is None:
        return None
    return Serving(label, info.card.names, info.card.model_hash, info.layout.fingerprint)


def differing(workers: Iterable[Serving]) -> list[str]:
    """A sentence for each name under which models or KV layouts differ."""
    by_name: defaultdict[str, list[Serving]] = defaultdict(list)
    for worker in workers:
        for name in worker.names:
            by_name[name].append(worker)
    found = []
    for name, same in sorted(by_name.items()):
        hashes, layouts = _labels(same, "model_hash"), _labels(same, "layout")
        if len(hashes) > 1:
            found.append(f"{len(hashes)} different models are called {name!r}: {_listed(hashes)}")
        elif len(layouts) > 1:
            found.append(f"workers of {name!r} keep KV in {len(layouts)} ways and exchange no KV blocks: {_listed(layouts)}")
    return found


def _labels(workers: Iterable[Serving], field: str) -> dict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for worker in workers:
        found[getattr(worker, field)].append(worker.label)
    return found


def _listed(groups: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{short(digest)} at {', '.join(sorted(set(labels)))}" for digest, labels in sorted(groups.items()))
