"""The mesh as a whole: which peers hear which by multicast, names, versions, clocks, missing roles."""

from collections import defaultdict
from collections.abc import Iterator

from meshserve.observe.diagnosis.facts import MULTICAST_PORT, Facts, Finding, PathMtu, PeerFacts, count, error, info, names, warning

_NEEDED = {
    "frontend": "no peer takes HTTP requests",
    "processor": "no peer can process a request",
    "decode": "no peer can generate tokens",
}


def judge_mesh(facts: Facts) -> Iterator[Finding]:
    """All but connections."""
    peers = [peer for peer in facts.peers if peer.is_alive]
    if peers:
        machines = "" if facts.elsewhere() else ", all on this machine"
        yield info(
            "peers", f"{count(len(peers), 'peer')} of the mesh {facts.mesh!r}{machines}: {names((peer.label for peer in peers), 20)}"
        )
    yield from _multicast(facts, peers)
    yield from _names(peers)
    yield from _missing(peers)
    yield from _versions(peers)
    yield from _clocks(peers)
    yield from _large_messages(peers)


def _multicast(facts: Facts, peers: list[PeerFacts]) -> Iterator[Finding]:
    """Multicast is blocked for a peer that hears no other machine although peers there announce themselves."""
    known = {peer.incarnation: peer for peer in peers}
    speaking = [peer for peer in peers if peer.view is not None and peer.view.mdns == "on" and not peer.is_young]
    deaf, num_asked = [], 0
    for listener in speaking:
        others = [peer.incarnation for peer in speaking if not facts.on_one_machine(peer, listener)]
        if others and listener.view is not None:
            num_asked += 1
            heard = (known.get(incarnation) for incarnation in listener.view.heard)
            if all(peer is not None and facts.on_one_machine(peer, listener) for peer in heard):
                deaf.append(listener)
    remote = [peer for peer in speaking if not facts.is_here(peer)]
    is_deaf_here = facts.use_mdns and bool(remote) and not facts.heard.intersection(peer.incarnation for peer in remote)
    if is_deaf_here or deaf:
        yield _multicast_finding(facts, deaf, is_deaf_here, is_everybody=len(deaf) == num_asked and num_asked > 1)
    else:
        yield from _unheard(facts, speaking)
    for peer in peers:
        if peer.view is not None and peer.view.mdns not in ("on", "off"):
            yield warning("mdns_fails", f"mDNS does not work on the machine of {peer.label}", peer.view.mdns, _advice(facts, peer))


def _multicast_finding(facts: Facts, deaf: list[PeerFacts], is_deaf_here: bool, is_everybody: bool) -> Finding:
    elsewhere = [f"the machine of {peer.label} ({peer.place})" for peer in deaf if not facts.is_here(peer)]
    here = ["this machine"] if is_deaf_here or len(elsewhere) < len(deaf) else []
    where = "this network" if is_everybody else names([*here, *elsewhere])
    seen = "peers on other machines announce themselves, and none of the announcements arrived there"
    reached = next((peer for peer in facts.elsewhere() if peer not in deaf), None)
    joining = f"Start peers there with --peer {reached.place if reached else 'ADDRESS'}, which joins the whole mesh without multicast"
    letting = f"or let {MULTICAST_PORT} through the firewall (`ufw allow {MULTICAST_PORT}`; guest Wi-Fi and client isolation block it)"
    return warning("multicast_blocked", f"multicast is blocked: {where}", seen, f"{joining}; {letting}.")


def _unheard(facts: Facts, speaking: list[PeerFacts]) -> Iterator[Finding]:
    for speaker in speaking:
        listeners = [peer for peer in speaking if not facts.on_one_machine(peer, speaker)]
        heard_by = [peer for peer in listeners if peer.view is not None and speaker.incarnation in peer.view.heard]
        is_heard_here = facts.is_here(speaker) or not facts.use_mdns or speaker.incarnation in facts.heard
        if len(listeners) > 1 and not heard_by and not is_heard_here:
            cause = f"multicast from {speaker.label} ({speaker.place}) reaches no peer"
            yield warning("multicast_blocked", cause, f"{names(peer.label for peer in listeners)} hear others", _advice(facts, speaker))


def _advice(facts: Facts, peer: PeerFacts) -> str:
    other = next((found for found in facts.peers if found.is_alive and not facts.on_one_machine(found, peer)), None)
    return f"Start it with --peer {other.place if other else 'ADDRESS'}; or let {MULTICAST_PORT} through its machine's firewall."


def _names(peers: list[PeerFacts]) -> Iterator[Finding]:
    by_name = defaultdict(list)
    for peer in peers:
        by_name[peer.name].append(peer)
    for name, found in by_name.items():
        if name and len(found) > 1:
            seen = f"at {names(peer.place for peer in found)}"
            cause = f"{len(found)} peers have the name {name}"
            yield warning("same_name", cause, seen, "Give each its own --name, or leave it out: then each gets one of its own.")


def _missing(peers: list[PeerFacts]) -> Iterator[Finding]:
    roles = {role for peer in peers for role in peer.roles}
    unknown = any(not peer.roles for peer in peers)
    missing = [role for role in _NEEDED if role not in roles]
    if peers and missing and not unknown:
        advice = f"`meshserve run --role {','.join(missing)}` on one of the machines; if it runs already, see the other findings."
        consequences = ", ".join(_NEEDED[role] for role in missing)
        yield warning("role_missing", f"the mesh has no {' and no '.join(missing)}", consequences, advice)


def _versions(peers: list[PeerFacts]) -> Iterator[Finding]:
    by_version = defaultdict(list)
    for peer in peers:
        if peer.version:
            by_version[peer.version].append(peer.label)
    if len(by_version) > 1:
        text = "; ".join(f"{version}: {names(labels)}" for version, labels in sorted(by_version.items()))
        yield info("versions", f"peers of several versions, which work together: {text}")


def _clocks(peers: list[PeerFacts]) -> Iterator[Finding]:
    offsets = {peer.label: peer.clock_offset_s for peer in peers if peer.view is not None}
    if offsets:
        label, most_s = max(offsets.items(), key=lambda item: abs(item[1]))
        text = f"{abs(most_s):.3f} s" if abs(most_s) < 60 else f"{abs(most_s) / 60:.0f} min"
        words = f"clocks agree within {text}" if abs(most_s) < 1 else f"clocks differ from this machine's by up to {text} ({label})"
        yield info("clocks", f"{words}; nothing depends on it")


def _large_messages(peers: list[PeerFacts]) -> Iterator[Finding]:
    """Where packets of full length are lost it matters only if nobody says so to those who send them: then long messages are too."""
    stuck = [peer for peer in peers if peer.carries_large is False]
    short = [peer for peer in peers if peer.path is not None and peer.path.largest < peer.path.mtu]
    measured = [_packets(peer, peer.path) for peer in short if peer.path is not None]
    if stuck:
        paths = [peer.path for peer in short if peer in stuck and peer.path is not None]
        least = min(paths, key=lambda path: path.largest, default=None)
        device, mtu = (least.interface, least.largest) if least is not None else ("NAME", 1280)
        yield error(
            "mtu",
            f"long messages do not get to {names(peer.label for peer in stuck)} and back, short ones do",
            "; ".join(["64 KiB did not come back within the time that a short message needs", *dict.fromkeys(measured)]),
            "The path carries smaller packets than its ends believe (a VPN, a tunnel, jumbo frames): lower the MTU of the interface, "
            f"`ip link set dev {device} mtu {mtu}` here, and the same at the other end.",
        )
    elif measured:
        yield info("path_mtu", f"{names(measured)}; long messages get there all the same")


def _packets(peer: PeerFacts, path: PathMtu) -> str:
    return f"packets of {path.largest} bytes get to {peer.label}, those of {path.mtu} that {path.interface} sends do not"
