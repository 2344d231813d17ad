"""What a peer saw of others than members: strangers that it rejected, peers that are gone, mDNS.

For people who look for a fault, never for decisions. Pure, and bounded whatever comes in.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

from meshserve.mesh.hearsay import Dial
from meshserve.mesh.membership import Change, Member, PeerState
from meshserve.mesh.repeats import Repeats
from meshserve.telemetry import printable
from meshserve.wire.hello import PeerHint
from meshserve.wire.observing import Departure, Refusal

_MAX_STRANGERS, _MAX_GONE, _MAX_ANNOUNCEMENTS = 32, 32, 512
_MAX_TEXT = 160


@dataclass(frozen=True, slots=True)
class Announcement:
    """What mDNS says of a peer of this mesh or another. It may be forged."""

    mesh: str
    hint: PeerHint


class Sightings:
    """Of one peer. Methods take `now_s` of its monotonic clock; what it tells others is in seconds ago."""

    def __init__(self) -> None:
        self.announcements: dict[str, Announcement] = {}
        """By incarnation."""
        self._strangers: dict[tuple[str, str], tuple[int, float]] = {}
        """By name and reason, the latest last: how many times, and when last."""
        self._not_reached = Repeats()
        """By place."""
        self._gone: deque[tuple[str, str, str, str, float]] = deque(maxlen=_MAX_GONE)
        """Incarnation, name, address, reason, when."""

    def refused(self, who: str, reason: str, now_s: float) -> bool:
        """A stranger was not let in. True if this one had not been for this reason before, as far as is remembered."""
        key = who[:_MAX_TEXT], reason[:_MAX_TEXT]
        num_times, _ = self._strangers.pop(key, (0, 0.0))
        self._strangers[key] = num_times + 1, now_s
        if len(self._strangers) > _MAX_STRANGERS:
            del self._strangers[next(iter(self._strangers))]
        return not num_times

    def ended(self, change: Change, member: Member, now_s: float) -> None:
        """A member left or died."""
        info = member.info
        address = f"{info.addresses[0]}:{info.port}" if info.addresses else ""
        self._gone.append((info.incarnation, member.shown_name, address, why_gone(change, member), now_s))

    def name_of_gone(self, incarnation: str | None) -> str:
        """Of a member that left or died; empty if it is not known."""
        return next((name for gone, name, *_ in self._gone if gone == incarnation), "")

    def not_reached(self, place: str, now_s: float) -> int:
        """A dial to this place was in vain: how often in a row, if people should hear of it now, else 0.

        They hear of the first, after a minute again, then at pauses that grow to an hour: a laptop that was taken home is dialled on.
        """
        return self._not_reached.again(place, now_s)

    def reached(self, dial: Dial) -> None:
        """A dial led to a peer: the next that does not is worth a line again."""
        for address in dial.addresses:
            self._not_reached.forget(f"{address}:{dial.port}")

    def announced(self, mesh: str, hint: PeerHint) -> None:
        """mDNS told of a peer. A flood of new ones changes nothing."""
        if hint.incarnation in self.announcements or len(self.announcements) < _MAX_ANNOUNCEMENTS:
            self.announcements[hint.incarnation] = Announcement(mesh[:63], hint)

    def to_wire(self, now_s: float) -> dict[str, Any]:
        """Strangers and peers that are gone, the latest first, as plain data."""
        refused = [
            Refusal(who=who, reason=reason, times=num_times, ago_s=round(now_s - last_s, 3))
            for (who, reason), (num_times, last_s) in reversed(self._strangers.items())
        ]
        gone = [
            Departure(incarnation=incarnation, name=name, address=address, reason=reason, ago_s=round(now_s - at_s, 3))
            for incarnation, name, address, reason, at_s in reversed(self._gone)
        ]
        return {"refused": refused, "gone": gone}


def why_gone(change: Change, member: Member) -> str:
    """In words, of a member that has just left or died."""
    if change is Change.LEFT:
        return "left"
    if member.was_cut:
        return "ended without goodbye"
    return "fell silent" if member.state is PeerState.SUSPECT else "another incarnation took its place"


def describe_stranger(hello: Any) -> str:
    """The name and address in this hello, which may be malformed or a lie."""
    peer = hello.get("peer") if isinstance(hello, dict) else None
    if not isinstance(peer, dict):
        return "somebody"
    addresses = peer.get("addresses")
    address = f" at {printable(addresses[0])}" if isinstance(addresses, list) and addresses and isinstance(addresses[0], str) else ""
    name = str(peer.get("name"))[:63]
    return (name if name.isprintable() else "somebody") + address[:63]
