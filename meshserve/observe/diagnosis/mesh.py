"""The mesh as a whole: multicast, names, versions, clocks, missing roles; and strangers, which are no members of it."""

import difflib
from collections import defaultdict
from collections.abc import Iterator

from meshserve.mesh.network import Outcome
from meshserve.observe.diagnosis.facts import (
    MULTICAST_PORT,
    Facts,
    Finding,
    PeerFacts,
    Stranger,
    count,
    error,
    info,
    names,
    stale_address,
    warning,
)
from meshserve.observe.variants import differing

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
    yield from _variants(peers)
    yield from _advertised(peers)
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


def _variants(peers: list[PeerFacts]) -> Iterator[Finding]:
    for words in differing(peer.serving for peer in peers if peer.serving is not None):
        yield warning(
            "model_variants",
            words,
            "",
            "Give each model a --served-model-name of its own; or start the workers with the same file, --kv-type and version.",
        )


def _advertised(peers: list[PeerFacts]) -> Iterator[Finding]:
    """What peers tell of their addresses, compared with what is there."""
    for peer in peers:
        if 0 < len(peer.advertised_in_vain()) < len(peer.addresses):  # where all are, nobody reaches it, which judge_pairs sees
            yield stale_address(peer)
        elif peer.announced and not set(peer.announced) & set(peer.addresses):
            yield warning(
                "stale_announcement",
                f"mDNS tells of {peer.label} at {', '.join(peer.announced)}, and it is at {', '.join(peer.addresses)}",
                "the announcement is an old one, or another machine's that repeats it",
                "Old announcements end within two minutes. If it stays, look for an mDNS repeater or reflector in the router.",
            )


def _clocks(peers: list[PeerFacts]) -> Iterator[Finding]:
    offsets = {peer.label: peer.clock_offset_s for peer in peers if peer.view is not None}
    if offsets:
        label, most_s = max(offsets.items(), key=lambda item: abs(item[1]))
        text = f"{abs(most_s):.3f} s" if abs(most_s) < 60 else f"{abs(most_s) / 60:.0f} min"
        words = f"clocks agree within {text}" if abs(most_s) < 1 else f"clocks differ from this machine's by up to {text} ({label})"
        yield info("clocks", f"{words}; nothing depends on it")


def _large_messages(peers: list[PeerFacts]) -> Iterator[Finding]:
    """Lost packets of full length matter only if their senders are not told: then long messages are lost too."""
    stuck = [peer for peer in peers if peer.carries_large is False]
    short = [(peer, peer.path) for peer in peers if peer.path is not None and peer.path.largest < peer.path.mtu]
    measured = [
        f"packets of {path.largest} bytes get to {peer.label}, those of {path.mtu} that {path.interface} sends do not"
        for peer, path in short
    ]
    if stuck:
        paths = [path for peer, path in short if peer in stuck]
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


# --- strangers: other keys, other meshes, other versions


def judge_strangers(facts: Facts) -> Iterator[Finding]:
    """By cause, not by peer: one wrong key file is one finding."""
    met = [stranger for stranger in facts.strangers if stranger.outcome == Outcome.OPEN]
    yield from _keys(facts, [stranger for stranger in met if stranger.kind == "key"])
    silent = [stranger for stranger in met if stranger.security is not None and not stranger.kind]
    if silent:
        yield error(
            "no_answer",
            f"connections to {names(stranger.place for stranger in silent)} succeed, but our hello gets no answer",
            silent[0].reason,
            "Restart that peer, if it hangs; if not, only short packets get there: lower the MTU, `ip link set dev NAME mtu 1280`.",
        )
    yield from _other_versions([stranger for stranger in met if stranger.kind == "protocol"])
    yield from _other_meshes(facts, [stranger for stranger in met if stranger.kind == "mesh"])
    for stranger in met:
        if stranger.is_seed and stranger.security is None:
            advice = "Compare with the address in the ready line of that peer."
            yield error("no_peer_there", f"--peer {stranger.place}: what listens there is no meshserve peer", "", advice)


def _keys(facts: Facts, met: list[Stranger]) -> Iterator[Finding]:
    closed = [stranger.place for stranger in met if stranger.security == "CURVE"]
    opened = [stranger.place for stranger in met if stranger.security == "NULL"]
    if closed and facts.has_key:
        yield error(
            "key_differs",
            f"a key other than {facts.fingerprint} at {names(closed)}",
            "they use CURVE and close a connection with our key",
            "Copy one key file to every machine; `meshserve key show FILE` must print the same everywhere.",
        )
    elif closed:
        yield error(
            "key_missing",
            f"a key at {names(closed)}, and none was given to this command",
            "they use CURVE",
            "Use their --key-file here too, with `doctor` and with every peer of the mesh.",
        )
    if opened and facts.has_key:
        yield error(
            "key_absent",
            f"no key at {names(opened)}, and this mesh has one",
            "they use ZeroMQ without a key",
            "Start them with --key-file and a copy of the same file, or leave it out everywhere.",
        )


def _other_versions(met: list[Stranger]) -> Iterator[Finding]:
    if met:
        places = names(stranger.place for stranger in met)
        yield error("version", f"another protocol version: {places}", met[0].reason, "Install the same meshserve on every machine.")


def _other_meshes(facts: Facts, refused: list[Stranger]) -> Iterator[Finding]:
    announced = {place for places in facts.other_meshes.values() for place in places}
    by_reason = defaultdict(list)
    for stranger in refused:
        if stranger.place not in announced:  # the announced ones are listed below, with the name of their mesh
            by_reason[stranger.reason].append(stranger)
    for reason, found in by_reason.items():
        is_meant = any(stranger.is_seed for stranger in found) or not any(peer.is_alive for peer in facts.peers)
        judged = error if is_meant else info if _can_serve(facts) else warning
        are = "is" if len(found) == 1 else "are"
        yield judged(
            "other_mesh", f"{names(stranger.place for stranger in found)} {are} of another mesh", reason, "Use one --mesh NAME everywhere."
        )
    for mesh, places in facts.other_meshes.items():
        cause = f"there is another mesh here: {mesh!r}, and {facts.mesh!r} was asked for"
        seen = f"announced by {names(places)}"
        advice = f"If they belong together, start all with the same --mesh; `meshserve doctor --mesh {mesh}` looks at that one."
        if not any(peer.is_alive for peer in facts.peers):
            yield error("other_mesh", cause, seen, advice)
        elif not _can_serve(facts) or difflib.SequenceMatcher(None, mesh.lower(), facts.mesh.lower()).ratio() > 0.75:
            yield warning("other_mesh", cause, seen, advice)
        else:
            yield info("other_mesh", cause, seen, advice)


def _can_serve(facts: Facts) -> bool:
    roles = {role for peer in facts.peers for role in peer.roles}
    return roles >= {"frontend", "processor", "decode"}
