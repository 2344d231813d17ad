"""Which peers are in the mesh, and which of them are alive: a pure decider.

It is told what happened and the time, keeps each peer's state, and answers what to do. No clock, no sockets: the rules are tables
in its tests, and time can be made up. The failure detector is a plain timeout on any sign of life, with a grace for our own
lateness (the idea of local health awareness: Dadgar et al., "Lifeguard", 2018).
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from meshserve.config import MeshConfig
from meshserve.mesh.hearsay import Dial, Hearsay, backoff_s
from meshserve.telemetry import printable
from meshserve.wire.hello import PeerHint, PeerInfo


class PeerState(StrEnum):
    """Of one peer as this peer sees it."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    """Silent for the failure timeout, or its connection is gone: gets no new work."""


class Change(StrEnum):
    """What became of a peer."""

    JOINED = "joined"
    UPDATED = "updated"
    MOVED = "moved"
    """Our connection leads to an address that the peer no longer has."""
    CALLABLE = "callable"
    SUSPECTED = "suspected"
    RECOVERED = "recovered"
    LEFT = "left"
    DIED = "died"


TALKING_ROLES = frozenset(
    frozenset(pair)
    for pair in (
        ("frontend", "processor"),
        ("processor", "router"),
        ("processor", "decode"),
        ("router", "decode"),
        ("router", "prefill"),
        ("router", "router"),
        ("decode", "prefill"),
    )
)
"""Pairs of roles that call each other; only links between such peers carry application heartbeats."""

_ROUND_TRIP_INTERVAL_S = 5.0
"""A peer that is heard all the time is pinged so often, to know how far away it is."""


_MAX_HEARD_AT = 8
_MAX_LEFT = 4096
NOBODY: Mapping[str, str] = {}


def _has_left(address: str, before: PeerInfo, now: PeerInfo) -> bool:
    """Whether a peer had this address and has it no more. Of an address that it never told, as behind a NAT, nothing is known."""
    plain = address.partition("%")[0]
    return plain in before.addresses and plain not in now.addresses and not plain.startswith("127.")


def are_talking(one: PeerInfo, other: PeerInfo) -> bool:
    """Whether the two need to notice quickly that the other hangs."""
    if one.is_observer or other.is_observer:
        return True
    return any(frozenset((mine, theirs)) in TALKING_ROLES for mine in one.roles for theirs in other.roles)


@dataclass(slots=True)
class Member:
    """One peer that said hello."""

    info: PeerInfo
    is_talking: bool
    heard_s: float
    started_s: float
    """When it started, on our clock: joined minus the age that it told."""
    state: PeerState = PeerState.ALIVE
    suspect_since_s: float = 0.0
    is_callable: bool = False
    """Our own connection to it is up."""
    was_cut: bool = False
    """Its connection was lost and has not come back."""
    linked_at: tuple[str, int] | None = None
    heard_at: tuple[str, ...] = ()
    """Addresses that its hellos came from, or that others told while it could not be reached: dialled too, the latest first."""
    next_dial_s: float = 0.0
    num_failed_dials: int = 0
    is_dialling: bool = False
    pinged_s: float = -math.inf
    doubted_for: str = ""
    """Another incarnation claims its place; which of the two is there a dial will tell."""
    shown_name: str = ""
    rtt_ms: float | None = None

    def note_address(self, address: str) -> None:
        """The peer was heard of at this address."""
        if address and address not in self.heard_at:
            self.heard_at = (address, *self.heard_at)[:_MAX_HEARD_AT]

    def places_to_dial(self) -> tuple[str, ...]:
        """All addresses that may lead to it, the one that did lately first."""
        linked = (self.linked_at[0],) if self.linked_at is not None else ()
        return tuple(dict.fromkeys((*linked, *self.info.addresses, *self.heard_at)))

    @property
    def shown_address(self) -> str:
        """For people: where it was reached, or says that it is; of a peer on this host, where others reach it."""
        if self.linked_at is not None and not (self.info.addresses and self.linked_at[0].startswith("127.")):
            return self.linked_at[0]
        return self.info.addresses[0]

    @property
    def can_take_work(self) -> bool:
        """Alive, reachable, where it says that it is, and not on its way out."""
        return self.is_callable and self.state is PeerState.ALIVE and not self.info.is_draining and not self.doubted_for


def _claims_place_of(info: PeerInfo, old: Member) -> bool:
    """Whether a newcomer says that it is where an older member was reached; only one process can be there."""
    if info.is_observer or old.info.is_observer or old.info.port != info.port:
        return False
    # addresses of container bridges are alike on many hosts, so one in common proves nothing: only the one that led us there does
    if old.linked_at is None:
        return set(old.info.addresses) == set(info.addresses)
    return old.linked_at[0] in info.addresses


@dataclass(slots=True)
class Actions:
    """What is to be done now."""

    changes: list[tuple[Change, Member]] = field(default_factory=list)
    dials: list[Dial] = field(default_factory=list)
    pings: list[str] = field(default_factory=list)


class Membership:
    """The state of all peers. Methods that report what happened return the changes that follow at once; `tick` returns all due actions."""

    def __init__(self, own: PeerInfo, config: MeshConfig, now_s: float, rng: random.Random | None = None) -> None:
        self.own, self._config = own, config
        self.members: dict[str, Member] = {}
        self._rng = rng or random.Random()
        self.hearsay = Hearsay(config, self._rng)
        self._gone: dict[str, float] = {}
        """Members that died or left, and when. The dead may speak again."""
        self._left: dict[str, float] = {}
        """Those that said goodbye: whatever of them still comes in is late."""
        self._last_tick_s = now_s

    # --- what was heard of

    def hint(self, hint: PeerHint, source: str, now_s: float) -> None:
        """Hearsay from mDNS or a member. Members, this peer, and peers that are known to have ended are not dialled for it."""
        incarnation = hint.incarnation
        member = self.members.get(incarnation)
        if member is not None and not member.is_callable:  # it may be elsewhere by now
            for address in reversed(hint.addresses[:_MAX_HEARD_AT]):
                member.note_address(address)
        has_ended = incarnation in self._gone or incarnation in self._left
        if member is None and not has_ended and incarnation != self.own.incarnation:
            self.hearsay.hint(hint, source, now_s)

    def hello(self, info: PeerInfo, age_s: float, now_s: float, speaks_from: str = "") -> list[tuple[Change, Member]]:
        """A peer introduced itself (or told what changed). One that left is not let in again.

        `speaks_from` is the address that the hello came from, if the peer made the connection.
        """
        if info.incarnation in self._left:
            return []
        is_dialling = self.hearsay.forget(info.incarnation)
        member = self.members.get(info.incarnation)
        if member is not None:
            before, member.info = member.info, info
            member.note_address(speaks_from)
            changes = [(Change.UPDATED, member)] if before != info else []
            if member.linked_at is not None and _has_left(member.linked_at[0], before, info):
                member.linked_at, member.next_dial_s, member.num_failed_dials = None, now_s, 0
                changes.append((Change.MOVED, member))
            return changes + self._heard(member, now_s)
        member = Member(info, are_talking(self.own, info), heard_s=now_s, started_s=now_s - age_s, next_dial_s=now_s)
        member.note_address(speaks_from)
        member.is_dialling = is_dialling  # its outcome will be told under the same key
        doubted = [old for old in self.members.values() if _claims_place_of(info, old)]
        for old in doubted:
            old.doubted_for = info.incarnation
        self.members[info.incarnation] = member
        self._gone.pop(info.incarnation, None)
        self._name_all()
        return [*((Change.UPDATED, old) for old in doubted), (Change.JOINED, member)]

    def heard(self, incarnation: str, now_s: float) -> list[tuple[Change, Member]]:
        """Any sign of life."""
        member = self.members.get(incarnation)
        return self._heard(member, now_s) if member is not None else []

    def _heard(self, member: Member, now_s: float) -> list[tuple[Change, Member]]:
        member.heard_s = now_s
        if member.state is PeerState.SUSPECT and not member.was_cut:
            member.state = PeerState.ALIVE
            return [(Change.RECOVERED, member)]
        return []

    # --- what became of connections

    def linked(self, incarnation: str, address: tuple[str, int], now_s: float) -> list[tuple[Change, Member]]:
        """Our connection to this member is up."""
        member = self.members[incarnation]
        member.is_callable, member.was_cut, member.is_dialling, member.num_failed_dials = True, False, False, 0
        member.linked_at = address
        return [*self._answered(address, incarnation, now_s), *self._heard(member, now_s), (Change.CALLABLE, member)]

    def unlinked(self, incarnation: str, now_s: float) -> list[tuple[Change, Member]]:
        """Our connection to it was lost; whether it is dead the next dial tells, which is due at once."""
        member = self.members.get(incarnation)
        if member is None:
            return []
        member.is_callable, member.was_cut, member.next_dial_s = False, True, now_s
        return self._suspect(member, now_s) if member.state is PeerState.ALIVE else []

    def dial_failed(
        self, dial: Dial, is_refused: bool, now_s: float, answered_by: Mapping[str, str] = NOBODY
    ) -> list[tuple[Change, Member]]:
        """None of the addresses led to this peer. Refused everywhere after its connection was lost: it is dead.

        `answered_by` tells which other peer answered at an address.
        """
        changes: list[tuple[Change, Member]] = []
        for host, incarnation in answered_by.items():
            changes += self._answered((host, dial.port), incarnation, now_s)
        member = self.members.get(dial.key)
        self.hearsay.failed(dial.key, now_s)
        if member is None:
            return changes
        if is_refused and member.was_cut:
            return [*changes, self._remove(member, Change.DIED, now_s)]
        member.is_dialling = False
        member.num_failed_dials += 1
        member.next_dial_s = now_s + backoff_s(member.num_failed_dials, self._config, self._rng)
        return changes

    def dial_found(self, key: str, incarnation: str, now_s: float) -> None:
        """A dial led to this peer."""
        self.hearsay.found(key, incarnation, now_s)
        member = self.members.get(incarnation)
        if member is not None:
            member.is_dialling = False

    def _answered(self, place: tuple[str, int], incarnation: str, now_s: float) -> list[tuple[Change, Member]]:
        """This peer answers at this place, so no other lives there: what one merely claims in its hello ends nobody."""
        self.hearsay.answered(place, incarnation)

        def was_there(member: Member) -> bool:
            is_same = member.linked_at == place or (member.linked_at is None and member.doubted_for == incarnation)
            return is_same and member.info.incarnation != incarnation

        changes = [self._remove(member, Change.DIED, now_s) for member in list(self.members.values()) if was_there(member)]
        found = self.members.get(incarnation)
        for member in self.members.values():
            if member.doubted_for == incarnation or (member is found and member.doubted_for):
                member.doubted_for = ""
                changes.append((Change.UPDATED, member))
        return changes

    def has_left(self, incarnation: str | None) -> bool:
        """Whether it said goodbye."""
        return incarnation in self._left

    def goodbye(self, incarnation: str, now_s: float) -> list[tuple[Change, Member]]:
        """The peer itself said, on its own link, that it leaves."""
        self._left[incarnation] = now_s
        if len(self._left) > _MAX_LEFT:
            del self._left[next(iter(self._left))]
        self.hearsay.forget(incarnation)
        member = self.members.get(incarnation)
        return [self._remove(member, Change.LEFT, now_s)] if member is not None else []

    # --- time

    def tick(self, now_s: float) -> Actions:
        """What is due. If we come late ourselves (a closed lid, a stopped process), all deadlines move by as much."""
        actions = Actions()
        late_s = now_s - self._last_tick_s - self._config.tick_interval_s
        if late_s > max(0.25, self._config.tick_interval_s):
            self._extend(late_s)
        self._last_tick_s = now_s
        for member in list(self.members.values()):
            self._check(member, now_s, actions)
        actions.dials = self.due_dials(now_s)
        actions.pings = self._due_pings(now_s)
        for ended, kept_s in ((self._gone, self._config.forget_hint_s), (self._left, self._config.forget_dead_s)):
            for incarnation in [old for old, since_s in ended.items() if now_s - since_s > kept_s]:
                del ended[incarnation]
        return actions

    def _due_pings(self, now_s: float) -> list[str]:
        """The peers to ask for a sign of life: those that gave none lately.

        A ping tells its receiver as much as its answer tells us, so of two idle peers the one whose clock ticks first asks, and the other
        need not: half of what it costs if both ask. Busy peers need no pings at all, but for the round trip now and then.
        """
        silent_s = now_s - self._config.heartbeat_interval_s + self._config.tick_interval_s / 2  # the tick next to it, not the one after
        unmeasured_s = now_s - _ROUND_TRIP_INTERVAL_S
        due = [
            member
            for member in self.members.values()
            if member.is_talking
            and (member.heard_s <= silent_s or member.pinged_s <= unmeasured_s)
            and member.pinged_s <= silent_s
            and member.is_callable
        ]
        for member in due:
            member.pinged_s = now_s
        return [member.info.incarnation for member in due]

    def _extend(self, late_s: float) -> None:
        for member in self.members.values():
            member.heard_s += late_s
            member.suspect_since_s += late_s

    def _check(self, member: Member, now_s: float, actions: Actions) -> None:
        can_be_silent = not member.is_talking and not member.was_cut
        if member.state is PeerState.ALIVE and now_s - member.heard_s > self._config.failure_timeout_s and not can_be_silent:
            actions.changes += self._suspect(member, now_s)
        if member.state is PeerState.SUSPECT and now_s - member.suspect_since_s > self._config.death_timeout_s:
            actions.changes.append(self._remove(member, Change.DIED, now_s))
            self._look_out_for(member, now_s)

    def _look_out_for(self, member: Member, now_s: float) -> None:
        """Silence may end: a link comes up again, a host wakes. The peer is dialled on, as if known by hearsay."""
        if self.hearsay.look_out_for(member.info, now_s):
            del self._gone[member.info.incarnation]

    def network_changed(self, now_s: float) -> None:
        """This host has other addresses: what could not be reached may be reached now."""
        self.hearsay.network_changed(now_s)
        for member in self.members.values():
            member.num_failed_dials, member.next_dial_s = 0, now_s

    def due_dials(self, now_s: float) -> list[Dial]:
        """Dials that are due, marked as under way: each ends in `dial_found` or `dial_failed`."""
        dials: list[Dial] = []
        for incarnation, member in self.members.items():
            if not member.is_callable and not member.is_dialling and not member.info.is_observer and now_s >= member.next_dial_s:
                member.is_dialling = True
                dials.append(Dial(incarnation, member.places_to_dial(), member.info.port, incarnation))
        return dials + list(self.hearsay.due(now_s, self._is_at_member))

    def _is_at_member(self, led_to: str | None, place: tuple[str, int]) -> bool:
        return led_to in self.members or any(member.linked_at == place for member in self.members.values())

    def _suspect(self, member: Member, now_s: float) -> list[tuple[Change, Member]]:
        member.state, member.suspect_since_s = PeerState.SUSPECT, now_s
        return [(Change.SUSPECTED, member)]

    def _remove(self, member: Member, change: Change, now_s: float) -> tuple[Change, Member]:
        del self.members[member.info.incarnation]
        self._gone[member.info.incarnation] = now_s
        for other in self.members.values():
            if other.doubted_for == member.info.incarnation:
                other.doubted_for = ""
        self._name_all()
        return change, member

    # --- names and lists

    def _name_all(self) -> None:
        """Of live peers with one name the later ones get a suffix."""
        by_age = sorted(self.members.values(), key=lambda member: (member.started_s, member.info.incarnation))
        seen = {self.own.name: 1}
        for member in by_age:
            is_taken = member.info.name in seen
            seen[member.info.name] = 1
            # printed everywhere, in lines whose words are split at spaces
            name = printable(member.info.name).replace(" ", "_")
            member.shown_name = f"{name}~{member.info.incarnation[:4]}" if is_taken and not member.info.is_observer else name

    def listed(self) -> list[Member]:
        """All but observers, oldest first."""
        return sorted((member for member in self.members.values() if not member.info.is_observer), key=lambda member: member.started_s)

    def places(self) -> list[tuple[str, str, tuple[str, ...], int]]:
        """Peers that this one reaches or would dial, members first: incarnation, name (empty if known by hearsay
        only), addresses, port."""
        members = [(member.info.incarnation, member.shown_name, member.info.addresses, member.info.port) for member in self.listed()]
        return members + [(incarnation, "", addresses, port) for incarnation, addresses, port in self.hearsay.places()]

    def hints(self) -> tuple[PeerHint, ...]:
        """What we pass on about others: only peers that we reach ourselves."""
        return tuple(member.info.hint for member in self.listed() if member.is_callable)
