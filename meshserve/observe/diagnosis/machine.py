"""What is wrong on this machine: its interfaces, its multicast, its ports."""

from collections.abc import Iterator

from meshserve.config import FIRST_PORT
from meshserve.mesh.interfaces import InterfaceKind, LocalAddress
from meshserve.observe.diagnosis.facts import (
    MULTICAST_PORT,
    PORTS,
    Facts,
    Finding,
    count,
    error,
    info,
    is_loopback,
    names,
    warning,
)

_PEER_HINT = "Start peers here with --peer ADDRESS of any one on another machine: it joins the whole mesh."


def judge_machine(facts: Facts) -> Iterator[Finding]:
    """Interfaces, mDNS, ports, key."""
    yield from _interfaces(facts)
    yield from _mdns(facts)
    yield from _ports(facts)
    if facts.has_key:
        yield info("key", f"this mesh is closed by the key {facts.fingerprint}")
    else:
        yield info("open_mesh", "no key: the mesh is open to every machine on this network", advice="`meshserve key new FILE` makes one.")


def _interfaces(facts: Facts) -> Iterator[Finding]:
    outside = [local for local in facts.interfaces if not is_loopback(local.address)]
    if not outside:
        advice = "Join the Wi-Fi or plug in the cable; peers on this machine alone find each other all the same."
        yield warning("no_network", "this machine is in no network", "its only interface is the loopback", advice)
        return
    unplugged = {local.interface for local in outside if local.kind is InterfaceKind.LAN and not local.has_carrier}
    if unplugged:
        advice = "Plug in the cable or join the Wi-Fi; or take the address away, so that peers here do not advertise it."
        yield warning("no_carrier", f"{names(unplugged)} of this machine has an address and no connection", "", advice)
    yield info("interfaces", f"this machine's addresses: {', '.join(map(_described, outside))}")
    real = {local.interface for local in outside if local.kind is InterfaceKind.LAN}
    if len(real) > 1 and facts.interface is None:
        yield info("several_networks", f"this machine is in several networks: {names(real)}", advice="--interface NAME pins one of them.")


def _described(local: LocalAddress) -> str:
    kind = {InterfaceKind.TUNNEL: ", VPN", InterfaceKind.VIRTUAL: ", containers"}.get(local.kind, "")
    return f"{local.address} ({local.interface}{kind})"


def _mdns(facts: Facts) -> Iterator[Finding]:
    if not facts.use_mdns:
        yield info("mdns_off", "--no-mdns: no peer was looked for by multicast")
        return
    if facts.mdns not in ("on", "off"):
        yield warning("mdns_fails", "mDNS does not work on this machine", facts.mdns, _PEER_HINT)
    for asked in facts.multicast:
        if asked.error is not None:
            yield warning("multicast_out", f"no multicast on {asked.interface} ({asked.address})", asked.error, _PEER_HINT)
    heard = frozenset[str]().union(*(asked.others for asked in facts.multicast))
    # a machine that hears others is not deaf, whether its own questions come back or not
    asked_well = [asked for asked in facts.multicast if asked.error is None]
    if asked_well and not any(asked.is_heard_back or asked.others for asked in asked_well):
        yield warning(
            "multicast_deaf",
            "this machine does not hear its own multicast",
            f"questions by multicast on {names(asked.interface for asked in facts.multicast)} did not come back",
            f"Let {MULTICAST_PORT} through this machine's firewall (`ufw allow {MULTICAST_PORT}`). {_PEER_HINT}",
        )
    elif heard:
        yield info("multicast_in", f"multicast arrives from {count(len(heard), 'other machine')}: {names(heard)}")


def _ports(facts: Facts) -> Iterator[Finding]:
    others = sorted({listener.port for listener in facts.listeners if listener.security is None})
    if others:
        text = f"a program other than meshserve listens on this machine at {', '.join(map(str, others))}"
        yield info("port_taken", text, advice="Peers take the next free ports, unless --port says otherwise.")
    if facts.next_port is None or facts.next_port > FIRST_PORT + 96:
        yield warning(
            "ports_full",
            f"no four free ports in a row from {FIRST_PORT} to {FIRST_PORT + 99} on this machine",
            "the next peer would listen above, where firewalls may not expect it",
            "End what listens there, or open the ports that the ready line of `run` names.",
        )
    elif facts.listeners:
        yield info("next_port", f"the next peer on this machine listens from port {facts.next_port} on")


def judge_alone(facts: Facts) -> Iterator[Finding]:
    """No peer, or none on other machines: the reasons that lie on this machine. Also each --peer that does not answer."""
    for seed in facts.strangers:
        if seed.is_seed and seed.outcome != "open":
            judged = warning if facts.elsewhere() else error
            yield judged("seed_silent", f"--peer {seed.place}: {_WORDS.get(seed.outcome, seed.outcome)}", "", _SEED_ADVICE)
    if facts.elsewhere():
        return
    is_heard = any(asked.others for asked in facts.multicast)
    silence = "" if is_heard or not facts.use_mdns else "no other machine answers multicast"
    has_network = not all(is_loopback(local.address) for local in facts.interfaces)
    if not any(peer.is_alive for peer in facts.peers):
        yield error(
            "no_peers",
            f"no peer of the mesh {facts.mesh!r} can be seen from here",
            silence,
            f"Is one running? Then: the same --mesh and --key-file everywhere; --peer ADDRESS of one; a firewall that lets {PORTS} in.",
        )
    elif silence and facts.interface is None and has_network:
        yield warning(
            "alone",
            "all peers that can be seen are on this machine",
            silence,
            f"If there are others on this network, it blocks multicast. {_PEER_HINT}",
        )
    else:
        yield info("alone", "all peers that can be seen are on this machine", silence)


_WORDS = {
    "refused": "that machine answers, and nothing listens at this port",
    "timeout": "no answer",
    "unreachable": "there is no route to it",
    "forbidden": "this machine's own firewall does not let it out",
    "reset": "the connection was closed at once",
}
_SEED_ADVICE = f"Compare with the address in the ready line of that peer; let {PORTS} through its machine's firewall."
