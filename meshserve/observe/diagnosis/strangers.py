"""What answers and does not become a member: peers with other keys, of other meshes, of other versions."""

import difflib
from collections import defaultdict
from collections.abc import Iterator

from meshserve.mesh.network import Outcome
from meshserve.observe.diagnosis.facts import Facts, Finding, Stranger, error, info, names, warning


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
    yield from _versions([stranger for stranger in met if stranger.kind == "protocol"])
    yield from _meshes(facts, [stranger for stranger in met if stranger.kind == "mesh"])
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


def _versions(met: list[Stranger]) -> Iterator[Finding]:
    if met:
        places = names(stranger.place for stranger in met)
        yield error("version", f"another protocol version: {places}", met[0].reason, "Install the same meshserve on every machine.")


def _meshes(facts: Facts, refused: list[Stranger]) -> Iterator[Finding]:
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
