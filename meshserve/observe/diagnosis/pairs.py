"""Who can connect to whom: every peer's own attempts at all others, put together."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from meshserve.mesh.network import Outcome
from meshserve.observe.diagnosis.facts import HERE, PORTS, Facts, Finding, PeerFacts, count, error, info, is_within, names, warning
from meshserve.observe.reach import PORT_NAMES
from meshserve.wire.hello import PortKnock

_MOST_TELLING = (Outcome.OPEN, Outcome.REFUSED, Outcome.RESET, Outcome.FORBIDDEN, Outcome.TIMEOUT, Outcome.UNREACHABLE)
_WORDS = {
    Outcome.REFUSED: "connections are refused",
    Outcome.TIMEOUT: "connections get no answer",
    Outcome.UNREACHABLE: "there is no route to it",
    Outcome.RESET: "connections are closed at once",
    Outcome.FORBIDDEN: "the sending machine's own firewall forbids it",
}


@dataclass(slots=True)
class _Source:
    """A peer that was asked, or this process."""

    incarnation: str
    label: str
    networks: tuple[str, ...]
    own: frozenset[str]
    """Addresses of its machine: a connection to one of these stays there, even if another machine has the same address."""
    heard: Collection[str]
    knocks: tuple[PortKnock, ...]
    calls: dict[str, str] = field(default_factory=dict)
    """The best outcome at the calls port, by target."""

    def __post_init__(self) -> None:
        for found in self.knocks:
            if found.offset == 0 and found.address not in self.own:
                best = min(self.calls.get(found.target, found.outcome), found.outcome, key=lambda item: _MOST_TELLING.index(Outcome(item)))
                self.calls[found.target] = best


class _Table:
    """Sources and targets."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.peers = {peer.incarnation: peer for peer in facts.peers}
        self.sources = {
            peer.incarnation: _Source(peer.incarnation, peer.label, peer.view.networks, peer.view.addresses, peer.view.heard, peer.knocks)
            for peer in facts.peers
            if peer.knocks is not None and peer.view is not None
        }
        if not any(facts.is_here(self.peers[source]) for source in self.sources):
            networks = tuple(local.network for local in facts.interfaces if local.network)
            own = frozenset(local.address for local in facts.interfaces)
            self.sources[HERE] = _Source(HERE, "this machine", networks, own, facts.heard, facts.knocks)

    def others(self, target: PeerFacts) -> list[_Source]:
        """Sources on other machines than the target's."""
        return [source for source in self.sources.values() if not self._is_at(source, target)]

    def _is_at(self, source: _Source, target: PeerFacts) -> bool:
        if source.incarnation == HERE:
            return self.facts.is_here(target)
        return self.facts.on_one_machine(self.peers[source.incarnation], target)

    def gets_back(self, target: PeerFacts, source: _Source) -> bool:
        """Whether the target reaches the source: it reports so, or the source had a hello from it."""
        own = self.sources.get(target.incarnation)
        if own is not None and own.calls.get(source.incarnation) == Outcome.OPEN:
            return True
        return any(found.target == target.incarnation and found.name for found in source.knocks)

    def is_heard_one_way(self, target: PeerFacts, source: _Source) -> bool:
        """The target's multicast arrives at the source, and not the reverse, as far as the target can be asked."""
        if target.incarnation not in source.heard:
            return False
        own = self.sources.get(target.incarnation)
        return own is None or source.incarnation not in own.heard


def judge_pairs(facts: Facts) -> Iterator[Finding]:
    """First who is reached by nobody, then the pairs that do not reach each other."""
    table = _Table(facts)
    by_target = {peer.incarnation: _judge_target(table, peer) for peer in facts.peers}
    findings = [finding for finding in by_target.values() if finding is not None]
    cut_off = {incarnation for incarnation, finding in by_target.items() if finding is not None}
    findings += _judge_each_pair(table, cut_off)
    for target in facts.peers:
        if target.incarnation not in cut_off:
            findings += _judge_other_ports(table, target)
            findings += _judge_unknown(table, target)
    yield from findings
    num_pairs = sum(len(table.peers.keys() & source.calls.keys()) for source in table.sources.values() if source.incarnation != HERE)
    if num_pairs and not findings:
        yield info("all_reach_all", f"every peer can connect to all others ({count(num_pairs, 'pair')} tried)")


def _judge_target(table: _Table, target: PeerFacts) -> Finding | None:
    """Why nobody on another machine reaches this one; None if somebody does, or nobody tried."""
    sources = [source for source in table.others(target) if target.incarnation in source.calls]
    outcomes = {source.calls[target.incarnation] for source in sources}
    if not sources or Outcome.OPEN in outcomes:
        return None
    if not target.is_alive:
        return _gone(target, outcomes)
    who = f"{target.label} ({target.place})"
    seen = "; ".join(f"from {source.label}: {_WORDS[Outcome(source.calls[target.incarnation])]}" for source in sources[:4])
    if _advertises_wrongly(target, sources):
        return _wrong_interface(target, sources, seen)
    if len(sources) == 1 and table.sources.get(target.incarnation) and table.is_heard_one_way(target, sources[0]):
        return _one_way_lost(sources[0].label, target.label, seen)
    if outcomes == {Outcome.REFUSED}:
        advice = f"Its firewall rejects {PORTS}; or its ready line names another port than others were told."
    else:
        advice = f"Let {PORTS} through the firewall of its machine (`ufw allow {PORTS.replace('-', ':')}`); guest Wi-Fi may forbid it."
    return error("port_blocked", f"no peer can connect to {who}, though it runs", seen, advice)


def _gone(target: PeerFacts, outcomes: set[str]) -> Finding:
    if outcomes == {Outcome.REFUSED}:
        return info("stale", f"{target.label} has ended: nothing listens there any more, and the mesh forgets it by itself")
    cause = f"{target.label} was in the mesh before and does not answer"
    return info("stale", cause, advice="Its machine is off, asleep, or behind a firewall.")


def _advertises_wrongly(target: PeerFacts, sources: list[_Source]) -> bool:
    """Its addresses are in networks that none of the others is in, or are such as every machine has of its own."""
    known = [source for source in sources if source.networks]

    def is_of_use(address: str) -> bool:
        return any(is_within(address, source.networks) and address not in source.own for source in known)

    return bool(known) and not any(map(is_of_use, target.addresses))


def _wrong_interface(target: PeerFacts, sources: list[_Source], seen: str) -> Finding:
    shared = sorted({network for source in sources for network in source.networks if not network.startswith(("127.", "::1"))})
    return error(
        "wrong_interface",
        f"{target.label} advertises {', '.join(target.addresses)}, which is in none of the others' networks",
        "; ".join(part for part in (f"the others are in {names(shared)}", seen) if part),
        "Start it without --interface, or with the one that is in the others' network.",
    )


def _one_way_lost(sender: str, receiver: str, seen: str) -> Finding:
    return error(
        "one_way",
        f"packets go one way only: those of {receiver} reach {sender}, those of {sender} do not reach {receiver}",
        seen,
        f"Look for a firewall, a VPN or a switch rule that drops what comes from {sender}, at {receiver} and in between.",
    )


def _judge_each_pair(table: _Table, cut_off: set[str]) -> Iterator[Finding]:
    done: set[frozenset[str]] = set()
    for target in table.facts.peers:
        for source in table.others(target):
            outcome = source.calls.get(target.incarnation)
            pair = frozenset((_machine(table, source.incarnation), _machine(table, target.incarnation)))
            is_cut_off = target.incarnation in cut_off or source.incarnation in cut_off
            if outcome is None or outcome == Outcome.OPEN or pair in done or is_cut_off or not target.is_alive:
                continue
            done.add(pair)
            yield _judge_pair(table, source, target, outcome)


def _machine(table: _Table, incarnation: str) -> str:
    peer = table.peers.get(incarnation)
    return HERE if peer is None or table.facts.is_here(peer) else peer.addresses[0] if peer.addresses else incarnation


def _judge_pair(table: _Table, source: _Source, target: PeerFacts, outcome: str) -> Finding:
    seen = f"from {source.label} to {target.label}: {_WORDS[Outcome(outcome)]}"
    if table.gets_back(target, source):
        return error(
            "one_way",
            f"{source.label} cannot connect to {target.label}, though {target.label} reaches {source.label}",
            seen,
            f"Let {PORTS} through the firewall of {target.label}'s machine, for connections from {source.label} too.",
        )
    if table.is_heard_one_way(target, source):
        return _one_way_lost(source.label, target.label, seen)
    own = table.sources.get(target.incarnation)
    asked = table.peers.get(source.incarnation)
    if own is not None and asked is not None and table.is_heard_one_way(asked, own):
        return _one_way_lost(target.label, source.label, seen)
    return error(
        "pair_blocked",
        f"{' and '.join(sorted((source.label, target.label)))} cannot connect to each other, though others reach both",
        seen,
        "Are both in one network? Wi-Fi client isolation, a VPN on one of them, or a firewall keeps them apart.",
    )


def _judge_other_ports(table: _Table, target: PeerFacts) -> Iterator[Finding]:
    """Calls work, KV blocks or tickets do not."""
    for offset in range(1, len(PORT_NAMES)):
        at_port = {
            source.label: found.outcome
            for source in table.others(target)
            for found in source.knocks
            if (found.target, found.offset) == (target.incarnation, offset)
        }
        closed = {label: outcome for label, outcome in at_port.items() if outcome != Outcome.OPEN}
        if closed:
            yield error(
                "port_blocked",
                f"port {target.port + offset} ({PORT_NAMES[offset]}) of {target.label} is blocked, though {target.port} is open",
                "; ".join(f"from {label}: {_WORDS[Outcome(outcome)]}" for label, outcome in closed.items()),
                f"Let all of {PORTS} through the firewall of its machine: each peer uses four ports in a row.",
            )


def _judge_unknown(table: _Table, target: PeerFacts) -> Iterator[Finding]:
    """Peers on other machines that have never heard of it."""
    if not target.is_alive:
        return
    unaware = [source for source in table.others(target) if source.incarnation != HERE and target.incarnation not in source.calls]
    if not unaware:
        return
    seen = f"{names(source.label for source in unaware)} have not heard of it"
    if _advertises_wrongly(target, unaware):
        yield _wrong_interface(target, unaware, seen)
        return
    yield warning(
        "not_known",
        f"{target.label} ({target.place}) is not known to all",
        seen,
        f"If it has just started, ask again; else start one of them with --peer {target.place}.",
    )
