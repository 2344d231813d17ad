"""From facts to causes: the diagnosis as a table, without a network."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from meshserve.mesh.interfaces import LocalAddress
from meshserve.observe.diagnosis import diagnose
from meshserve.observe.diagnosis.facts import (
    Facts,
    Finding,
    Listener,
    Multicast,
    PathMtu,
    PeerFacts,
    Severity,
    Stranger,
    is_wrong,
    names,
)
from meshserve.observe.variants import Serving
from meshserve.wire.hello import NetworkView, PortKnock
from meshserve.wire.structs import replace as replace_message

ROLES = {"a": ("frontend", "processor", "router"), "b": ("decode",), "c": ("prefill",)}
ADDRESSES = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}
HERE = (LocalAddress("lo", "127.0.0.1", 8), LocalAddress("eth0", "10.0.0.1", 24))
HEARD = (Multicast("eth0", "10.0.0.1", None, True, frozenset({"10.0.0.2"})),)

Blocked = dict[tuple[str, str], str]
"""Outcomes of connections from one to another that do not come about."""


def knocks(source: str, blocked: Blocked, closed_ports: Iterable[tuple[str, int]] = ()) -> tuple[PortKnock, ...]:
    found = []
    for target, address in ADDRESSES.items():
        outcome = blocked.get((source, target), "open")
        if target != source:
            found.append(PortKnock(target, address, 7800, 0, outcome, target))
        if target != source and outcome == "open":
            found += [
                PortKnock(target, address, 7800, offset, "timeout" if (target, offset) in closed_ports else "open", target)
                for offset in (1, 2)
            ]
    return tuple(found)


def peer(name: str, blocked: Blocked | None = None, closed_ports: Iterable[tuple[str, int]] = ()) -> PeerFacts:
    others = tuple(other for other in ADDRESSES if other != name)
    view = NetworkView((f"{ADDRESSES[name]}/24",), "on", others, others, 0.0)
    own = knocks(name, blocked or {}, closed_ports)
    return PeerFacts(name, name, (ADDRESSES[name],), 7800, ROLES[name], "1", view, own, True, 0.01)


def facts(*peers: PeerFacts, **changes: object) -> Facts:
    """Three peers on three machines, the doctor on the first, and nothing wrong but the changes."""
    sound = Facts(
        "default",
        interfaces=HERE,
        multicast=HEARD,
        listeners=(Listener("10.0.0.1", 7800, "NULL"),),
        next_port=7804,
        peers=peers or tuple(map(peer, ADDRESSES)),
        knocks=knocks("doctor", {}),
        heard=frozenset(ADDRESSES),
    )
    return replace(sound, **changes)  # type: ignore[arg-type]  # fields of Facts


def wrong(found: Facts) -> dict[str, Finding]:
    """What is not information, by code."""
    return {finding.code: finding for finding in diagnose(found) if finding.severity is not Severity.INFO}


def with_view(name: str, **changes: object) -> PeerFacts:
    made = peer(name)
    assert made.view is not None
    return replace(made, view=replace_message(made.view, **changes))


def one_way(lost_from: str, lost_to: str) -> Facts:
    """All packets from one to the other are lost, multicast too: no connection comes about either way."""
    blocked = {(lost_from, lost_to): "timeout", (lost_to, lost_from): "timeout"}
    made = []
    for name in ADDRESSES:
        found = peer(name, blocked)
        own = tuple(replace_message(item, name="") if {name, item.target} == {lost_from, lost_to} else item for item in found.knocks or ())
        if name == lost_to and found.view is not None:
            heard = tuple(other for other in found.view.heard if other != lost_from)
            found = replace(found, view=replace_message(found.view, heard=heard))
        made.append(replace(found, knocks=own))
    return facts(*made)


def test_a_sound_mesh_has_nothing_wrong() -> None:
    found = diagnose(facts())
    assert not is_wrong(found) and any(finding.code == "all_reach_all" for finding in found)


def blocked_mesh(*pairs: tuple[str, str]) -> Facts:
    """Connections of these pairs get no answer; hellos once came through all the same."""
    blocked = dict.fromkeys(pairs, "timeout")
    return facts(*(peer(name, blocked) for name in ADDRESSES))


def kept_apart() -> Facts:
    """Neither hears or reaches the other; a third does."""
    made = []
    for name, other in (("a", "b"), ("b", "a")):
        own = [item for item in knocks(name, {}) if item.target != other]
        own.append(PortKnock(other, ADDRESSES[other], 7800, 0, "timeout"))
        made.append(replace(with_view(name, heard=("c",)), knocks=tuple(own)))
    return facts(*made, peer("c"))


def misplaced(address: str, outcome: str, *interfaces: str) -> Facts:
    """The second peer advertises this address only, and the others' attempts at it meet this."""
    made = []
    for name in "ac":
        own = [item for item in knocks(name, {}) if item.target != "b"]
        own.append(PortKnock("b", address, 7800, 0, outcome, "b"))
        made.append(replace(with_view(name, interfaces=(f"{ADDRESSES[name]}/24", *interfaces)), knocks=tuple(own)))
    return facts(*made, replace(peer("b"), addresses=(address,), knocks=None))


def unknown_to_others(address: str) -> Facts:
    """The second peer is known to nobody but the doctor."""
    others = (replace(peer(name), knocks=tuple(item for item in knocks(name, {}) if item.target != "b")) for name in "ac")
    return facts(*others, replace(peer("b"), addresses=(address,)))


def met(security: str, *, has_key: bool = False, kind: str = "key") -> Facts:
    """Somebody at one more address, who does not become a member."""
    return facts(has_key=has_key, fingerprint="1234", strangers=(Stranger("10.0.0.9", 7800, "open", security, kind, "upgrade"),))


DEAF: frozenset[str] = frozenset()
ALL_DEAF = facts(*(with_view(name, heard=tuple(DEAF)) for name in ADDRESSES), heard=DEAF)
MUTE_C = facts(with_view("a", heard=("b",)), with_view("b", heard=("a",)), peer("c"), heard=frozenset("ab"))
TWINS = facts(peer("a"), *(replace(peer(name), name="twin") for name in "bc"))
NOBODY = facts(peers=(), knocks=(), heard=DEAF)
PLACE = "10.0.0.9:7800"
SEED = Stranger("10.0.0.9", 7800, "refused", is_seed=True)

TABLE: list[tuple[str, Facts, str, str]] = [
    ("nobody can connect to a peer", blocked_mesh(("a", "b"), ("c", "b")), "port_blocked", "b (10.0.0.2:7800)"),
    ("one port of four", facts(*(peer(name, {}, [("b", 1)]) for name in ADDRESSES)), "port_blocked", "port 7801 (bulk) of b"),
    ("a firewall for one only", blocked_mesh(("a", "b")), "one_way", "a cannot connect to b, though b"),
    ("packets one way only", one_way("a", "b"), "one_way", "those of a do not reach b"),
    ("the other way", one_way("b", "a"), "one_way", "those of b do not reach a"),
    ("a pair kept apart", kept_apart(), "pair_blocked", "a and b"),
    ("no multicast here", facts(with_view("a", heard=tuple(DEAF)), peer("b"), peer("c"), heard=DEAF), "multicast_blocked", "this machine"),
    ("no multicast elsewhere", facts(peer("a"), peer("b"), with_view("c", heard=tuple(DEAF))), "multicast_blocked", "c (10.0.0.3:7800)"),
    ("no multicast anywhere", ALL_DEAF, "multicast_blocked", "this network"),
    ("multicast does not get out", MUTE_C, "multicast_blocked", "from c (10.0.0.3:7800) reaches no peer"),
    ("an address in nobody's network", misplaced("10.9.9.9", "timeout"), "wrong_interface", "b advertises 10.9.9.9"),
    ("one that nobody was told of", unknown_to_others("10.9.9.9"), "wrong_interface", "b advertises 10.9.9.9"),
    ("one that every machine has", misplaced("172.17.0.1", "refused", "172.17.0.1/16"), "wrong_interface", "b advertises 172.17.0.1"),
    ("nobody was told of a peer", unknown_to_others("10.0.0.2"), "not_known", "b (10.0.0.2:7800)"),
    ("another key", met("CURVE", has_key=True), "key_differs", PLACE),
    ("no key here", met("CURVE"), "key_missing", PLACE),
    ("no key there", met("NULL", has_key=True), "key_absent", PLACE),
    ("another version", met("NULL", kind="protocol"), "version", PLACE),
    ("a peer that hangs", met("CURVE", kind="", has_key=True), "no_answer", PLACE),
    ("a mesh of nearly this name", facts(other_meshes={"Default": (PLACE,)}), "other_mesh", "'Default'"),
    ("another mesh, and none of ours", replace(NOBODY, other_meshes={"lab": (PLACE,)}), "other_mesh", "'lab'"),
    ("one name twice", TWINS, "same_name", "2 peers have the name twin"),
    ("no decode worker", facts(peer("a"), peer("c")), "role_missing", "no decode"),
    ("long messages are lost", facts(peer("a"), replace(peer("b"), carries_large=False), peer("c")), "mtu", "b"),
    ("nobody there", NOBODY, "no_peers", "'default'"),
    ("a --peer that does not answer", replace(NOBODY, strangers=(SEED,)), "seed_silent", PLACE),
    ("a --peer that does not answer, though others do", facts(strangers=(SEED,)), "seed_silent", PLACE),
    ("silence around", facts(peer("a"), multicast=(Multicast("eth0", "10.0.0.1", None, True),)), "alone", "this machine"),
    ("multicast cannot be sent", facts(multicast=(Multicast("eth0", "10.0.0.1", "not permitted"),)), "multicast_out", "eth0"),
    ("no network", facts(peer("a"), interfaces=HERE[:1]), "no_network", "no network"),
    ("ports are taken", facts(next_port=None), "ports_full", "no four free ports"),
    ("mDNS fails at a peer", facts(with_view("a", mdns="no multicast"), peer("b"), peer("c")), "mdns_fails", "a"),
]


@pytest.mark.parametrize(("found", "code", "words"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_cause_is_named_with_what_to_do(found: Facts, code: str, words: str) -> None:
    finding = wrong(found).get(code)
    assert finding is not None, diagnose(found)
    assert words in finding.cause and finding.advice


@pytest.mark.parametrize("code", ["port_blocked", "one_way", "same_name", "other_mesh", "mtu"])
def test_one_cause_brings_no_others_with_it(code: str) -> None:
    rows = [found for title, found, found_code, _ in TABLE if found_code == code and "none of ours" not in title]
    assert rows and all(set(wrong(found)) == {code} for found in rows)


def test_other_meshes_beside_a_sound_one_are_information() -> None:
    assert not wrong(facts(other_meshes={"lab": ("10.0.0.9:7800",)}))


def test_neighbours_of_another_mesh_are_one_finding_and_wrong_only_if_they_were_meant() -> None:
    strangers = tuple(Stranger("10.0.0.1", port, "open", "NULL", "mesh", "it belongs to 'lab'") for port in (7804, 7808))
    found = [finding for finding in diagnose(facts(strangers=strangers)) if finding.code == "other_mesh"]
    assert [finding.cause for finding in found] == ["10.0.0.1:7804, 10.0.0.1:7808 are of another mesh"]
    assert found[0].severity is Severity.INFO
    assert wrong(facts(peer("a"), strangers=strangers))["other_mesh"].severity is Severity.WARNING
    meant = (strangers[0], replace(strangers[1], is_seed=True))
    assert wrong(facts(strangers=meant))["other_mesh"].severity is Severity.ERROR
    assert wrong(replace(NOBODY, strangers=strangers))["other_mesh"].severity is Severity.ERROR


def test_who_has_just_started_is_no_witness_against_multicast() -> None:
    young = (replace(with_view(name, heard=tuple(DEAF)), is_young=True) for name in ADDRESSES)
    assert not wrong(facts(*young, heard=DEAF))
    one_young = replace(with_view("c", heard=tuple(DEAF)), is_young=True)
    assert not wrong(facts(peer("a"), peer("b"), one_young))


def test_a_path_that_carries_less_is_named_with_the_length_that_it_carries() -> None:
    narrow = PathMtu("eth0", 1500, 1420)
    lossy = facts(peer("a"), replace(peer("b"), carries_large=False, path=narrow), replace(peer("c"), path=PathMtu("eth0", 1500, 1500)))
    assert set(wrong(lossy)) == {"mtu"} and "`ip link set dev eth0 mtu 1420`" in wrong(lossy)["mtu"].advice
    assert "packets of 1420 bytes get to b, those of 1500 that eth0 sends do not" in wrong(lossy)["mtu"].seen
    known = facts(peer("a"), replace(peer("b"), carries_large=True, path=narrow), peer("c"))
    assert not wrong(known) and any(finding.code == "path_mtu" for finding in diagnose(known))


def test_what_has_ended_is_information() -> None:
    gone = PeerFacts("old", "", ("10.0.0.9",), 7800, is_alive=False)
    refused = PortKnock("old", "10.0.0.9", 7800, 0, "refused")
    peers = tuple(replace(peer(name), knocks=(*knocks(name, {}), refused)) for name in ADDRESSES)
    found = diagnose(facts(*peers, gone))
    assert not is_wrong(found) and any(finding.code == "stale" for finding in found)


def test_errors_come_first_and_lists_stay_short() -> None:
    found = diagnose(facts(peer("a"), replace(peer("b"), carries_large=False), has_key=True))
    assert [finding.severity for finding in found] == sorted((finding.severity for finding in found), key=list(Severity).index)
    assert names(map(str, range(9)), 3) == "0, 1, 2 and 6 more"


def findings_of(*peers: PeerFacts, **changes: object) -> dict[str, Finding]:
    return {found.code: found for found in diagnose(facts(*peers, **changes))}


def test_an_address_that_its_machine_does_not_have_is_the_cause_and_no_firewall() -> None:
    blocked = {("a", "b"): "timeout", ("c", "b"): "timeout"}
    moved = peer("b", blocked)
    assert moved.view is not None
    moved = replace(moved, view=replace_message(moved.view, interfaces=("10.0.0.77/24",)))
    found = findings_of(peer("a", blocked), moved, peer("c", blocked))
    assert "b advertises 10.0.0.2, which its machine does not have" in found["stale_address"].cause
    assert "10.0.0.77" in found["stale_address"].seen and not {"port_blocked", "one_way", "pair_blocked"} & found.keys()


def test_an_announcement_of_another_address_is_named() -> None:
    found = findings_of(peer("a"), replace(peer("b"), announced=("10.0.0.99",)), replace(peer("c"), announced=("10.0.0.3", "10.0.0.98")))
    assert "mDNS tells of b at 10.0.0.99, and it is at 10.0.0.2" in found["stale_announcement"].cause


def test_a_cable_that_is_out_is_named() -> None:
    out = (*HERE, LocalAddress("eth1", "10.9.0.1", 24, has_carrier=False))
    assert "eth1 of this machine" in findings_of(peer("a"), peer("b"), peer("c"), interfaces=out)["no_carrier"].cause


@pytest.mark.parametrize(
    ("hashes", "layouts", "words"), [("xy", "ll", "2 different models"), ("xx", "lm", "keep KV in 2 ways"), ("xx", "ll", "")]
)
def test_models_that_differ_under_one_name_are_named(hashes: str, layouts: str, words: str) -> None:
    served = [Serving(name, ("chat",), model, layout) for name, model, layout in zip("bc", hashes, layouts, strict=True)]
    found = findings_of(peer("a"), replace(peer("b"), serving=served[0]), replace(peer("c"), serving=served[1]))
    assert (words in found["model_variants"].cause) if words else "model_variants" not in found
