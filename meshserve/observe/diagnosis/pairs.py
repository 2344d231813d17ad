"""Who can connect to whom: every peer's own attempts at all others, put together."""

from collections.abc import Iterator
from itertools import product

from meshserve.mesh.network import Outcome
from meshserve.observe.diagnosis.facts import (
    HERE,
    PORTS,
    Facts,
    Finding,
    PeerFacts,
    count,
    error,
    info,
    is_within,
    names,
    stale_address,
    warning,
)
from meshserve.observe.reach import PORT_NAMES
from meshserve.wire.hello import NetworkView

_MOST_TELLING = (Outcome.OPEN, Outcome.REFUSED, Outcome.RESET, Outcome.FORBIDDEN, Outcome.TIMEOUT, Outcome.UNREACHABLE)
_WORDS = {
    Outcome.REFUSED: "connections are refused",
    Outcome.TIMEOUT: "connections get no answer",
    Outcome.UNREACHABLE: "there is no route to it",
    Outcome.RESET: "connections are closed at once",
    Outcome.FORBIDDEN: "the sending machine's own firewall forbids it",
}


class _Table:
    """Sources, which are the peers that were asked, and targets, which are all peers."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.views: dict[str, NetworkView] = {}
        """By source."""
        self.calls: dict[str, dict[str, str]] = {}
        """By source and target: the best outcome at the calls port."""
        self._sources: list[PeerFacts] = []
        for peer in facts.peers:
            if peer.knocks is not None and peer.view is not None:
                self._add(peer, peer.view)
        # a peer on this machine sees what this process sees; without one, this process is a source
        if not any(map(facts.is_here, self._sources)):
            interfaces = tuple(f"{local.address}/{local.prefix}" if local.prefix else local.address for local in facts.interfaces)
            addresses = tuple(local.address for local in facts.interfaces) or ("127.0.0.1",)
            here = PeerFacts(HERE, "this machine", addresses, 0, knocks=facts.knocks)
            self._add(here, NetworkView(interfaces, facts.mdns, tuple(facts.heard), (), 0.0))

    def _add(self, source: PeerFacts, view: NetworkView) -> None:
        self._sources.append(source)
        self.views[source.incarnation] = view
        calls = self.calls[source.incarnation] = {}
        for found in source.knocks or ():
            # a connection to an address of the source's own machine stays there, even if another machine has that address too
            if found.offset == 0 and found.address not in view.addresses:
                outcomes = calls.get(found.target, found.outcome), found.outcome
                calls[found.target] = min(outcomes, key=lambda outcome: _MOST_TELLING.index(Outcome(outcome)))

    def others(self, target: PeerFacts) -> list[PeerFacts]:
        """Sources on other machines than the target's."""
        return [source for source in self._sources if not self.facts.on_one_machine(source, target)]

    def gets_back(self, target: PeerFacts, source: PeerFacts) -> bool:
        """Whether the target reaches the source: it reports so, or the source had a hello from it."""
        if self.calls.get(target.incarnation, {}).get(source.incarnation) == Outcome.OPEN:
            return True
        return any(found.target == target.incarnation and found.name for found in source.knocks or ())

    def is_heard_one_way(self, target: PeerFacts, source: PeerFacts) -> bool:
        """The target's multicast arrives at the source, and not the reverse, as far as the target can be asked."""
        own = self.views.get(target.incarnation)
        is_heard = target.incarnation in self.views[source.incarnation].heard
        return is_heard and (own is None or source.incarnation not in own.heard)


def judge_pairs(facts: Facts) -> Iterator[Finding]:
    """First the peers that no other peer reaches, then the pairs that do not reach each other."""
    table = _Table(facts)
    by_target = {peer.incarnation: finding for peer in facts.peers if (finding := _judge_target(table, peer)) is not None}
    findings = [*by_target.values(), *_judge_each_pair(table, set(by_target))]
    for target in facts.peers:
        if target.incarnation not in by_target:
            findings += _judge_other_ports(table, target)
            findings += _judge_unknown(table, target)
    yield from findings
    known = {peer.incarnation for peer in facts.peers}
    num_pairs = sum(len(known & calls.keys()) for source, calls in table.calls.items() if source != HERE)
    if num_pairs and not findings:
        yield info("all_reach_all", f"every peer can connect to all others ({count(num_pairs, 'pair')} tried)")


def _judge_target(table: _Table, target: PeerFacts) -> Finding | None:
    """Why no peer on another machine reaches this one; None if one does, or if none tried."""
    sources = [source for source in table.others(target) if target.incarnation in table.calls[source.incarnation]]
    tried = [(source.label, table.calls[source.incarnation][target.incarnation]) for source in sources]
    outcomes = {outcome for _, outcome in tried}
    if not sources or Outcome.OPEN in outcomes:
        return None
    if not target.is_alive:
        if outcomes == {Outcome.REFUSED}:
            return info("stale", f"{target.label} has ended: nothing listens there any more, and the mesh forgets it by itself")
        cause = f"{target.label} was in the mesh before and does not answer"
        return info("stale", cause, advice="Its machine is off, asleep, or behind a firewall.")
    who = f"{target.label} ({target.place})"
    seen = "; ".join(f"from {label}: {_WORDS[Outcome(outcome)]}" for label, outcome in tried[:4])
    if _advertises_wrongly(table, target, sources):
        return _wrong_interface(table, target, sources, seen)
    if set(target.addresses) <= set(target.advertised_in_vain()):  # nobody is there to be reached: no firewall's doing
        return stale_address(target)
    if len(sources) == 1 and target.incarnation in table.views and table.is_heard_one_way(target, sources[0]):
        return _one_way_lost(sources[0].label, target.label, seen)
    if outcomes == {Outcome.REFUSED}:
        advice = f"Its firewall rejects {PORTS}; or its ready line names another port than others were told."
    else:
        advice = f"Let {PORTS} through the firewall of its machine (`ufw allow {PORTS.replace('-', ':')}`); guest Wi-Fi may forbid it."
    return error("port_blocked", f"no peer can connect to {who}, though it runs", seen, advice)


def _advertises_wrongly(table: _Table, target: PeerFacts, sources: list[PeerFacts]) -> bool:
    """Its addresses are in networks that none of the others is in, or are such as every machine has of its own."""
    known = [view for source in sources if (view := table.views[source.incarnation]).networks]
    pairs = product(target.addresses, known)
    return bool(known) and not any(is_within(address, view.networks) and address not in view.addresses for address, view in pairs)


def _wrong_interface(table: _Table, target: PeerFacts, sources: list[PeerFacts], seen: str) -> Finding:
    networks = {network for source in sources for network in table.views[source.incarnation].networks}
    shared = [network for network in networks if not network.startswith(("127.", "::1"))]
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
            outcome = table.calls[source.incarnation].get(target.incarnation)
            pair = frozenset((_machine(table.facts, source), _machine(table.facts, target)))
            is_cut_off = target.incarnation in cut_off or source.incarnation in cut_off
            if outcome is None or outcome == Outcome.OPEN or pair in done or is_cut_off or not target.is_alive:
                continue
            done.add(pair)
            yield _judge_pair(table, source, target, outcome)


def _machine(facts: Facts, peer: PeerFacts) -> str:
    return HERE if facts.is_here(peer) else peer.addresses[0] if peer.addresses else peer.incarnation


def _judge_pair(table: _Table, source: PeerFacts, target: PeerFacts, outcome: str) -> Finding:
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
    if target.incarnation in table.views and table.is_heard_one_way(source, target):
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
            for found in source.knocks or ()
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
    others = [source for source in table.others(target) if source.incarnation != HERE]
    unaware = [source for source in others if target.incarnation not in table.calls[source.incarnation]]
    if not unaware or not target.is_alive:
        return
    seen = f"{names(source.label for source in unaware)} have not heard of it"
    if _advertises_wrongly(table, target, unaware):
        yield _wrong_interface(table, target, unaware, seen)
        return
    advice = f"If it has just started, ask again; else start one of them with --peer {target.place}."
    yield warning("not_known", f"{target.label} ({target.place}) is not known to all", seen, advice)
