"""The faults of `bench.chaos`: which, when and to whom. Pure, and the same for a seed."""

import random
from dataclasses import dataclass

PERIOD_S = 2.0
KINDS = ("kill", "stop", "link_down", "move", "multicast_off", "router_restart", "drain")
FAILURE_TIMEOUT_S, DEATH_S = 1.5, 6.5
"""Of a silent peer: suspect, dead."""
_RECOVERY_S = 6.0
"""After a fault until its target counts as usable again, when the next faults are planned."""

PEERS = {
    "frontend": (0, "frontend"),
    "processor-1": (0, "processor"),
    "router-1": (0, "router"),
    "decode-1": (0, "decode"),
    "processor-2": (1, "processor"),
    "router-2": (1, "router"),
    "decode-2": (2, "decode"),
    "decode-3": (3, "decode"),
    "prefill-1": (3, "prefill"),
    "prefill-2": (4, "prefill"),
}
"""Each peer's host and role."""
NEEDED = ("processor", "router", "decode")
NUM_HOSTS, FRONT_HOST = 5, 0


@dataclass(frozen=True, slots=True)
class Fault:
    """What befalls a target: a peer, or `host N`."""

    at_s: float
    kind: str
    target: str
    lasts_s: float


class _Planned:
    """What is disturbed until when, as far as it is planned."""

    def __init__(self) -> None:
        self._peers: dict[str, float] = dict.fromkeys(PEERS, 0.0)
        self._hosts: dict[int, float] = dict.fromkeys(range(NUM_HOSTS), 0.0)

    def add(self, fault: Fault) -> None:
        """This fault is planned too."""
        until_s = fault.at_s + fault.lasts_s + _RECOVERY_S
        if fault.target in PEERS:
            self._peers[fault.target] = until_s
        else:
            self._hosts[number_of(fault.target)] = until_s

    def allows(self, target: str, at_s: float) -> bool:
        """Whether the target has no other fault, and the frontend then still reaches one undisturbed peer of each needed role."""
        if (self._peers[target] if target in PEERS else self._hosts[number_of(target)]) > at_s:
            return False
        cut = {number for number, until_s in self._hosts.items() if until_s > at_s}
        if target not in PEERS:
            cut.add(number_of(target))

        def is_left(peer: str) -> bool:
            is_reached = PEERS[peer][0] == FRONT_HOST or not cut & {PEERS[peer][0], FRONT_HOST}
            return is_reached and peer != target and self._peers[peer] <= at_s

        return set(NEEDED) <= {role for peer, (_, role) in PEERS.items() if is_left(peer)}


def plan(seed: int, seconds: float) -> list[Fault]:
    """One fault every period, each kind as often as any other as far as the mesh can bear it."""
    rng, planned, faults = random.Random(seed), _Planned(), list[Fault]()
    counts = dict.fromkeys(KINDS, 0)
    at_s = PERIOD_S
    while at_s < seconds:
        for kind in sorted(KINDS, key=lambda kind: (counts[kind], rng.random())):
            targets = [target for target in _targets(kind) if planned.allows(target, at_s)]
            if targets:
                faults.append(Fault(at_s, kind, rng.choice(targets), _lasts_s(kind, rng)))
                planned.add(faults[-1])
                counts[kind] += 1
                break
        at_s += PERIOD_S
    return faults


def _lasts_s(kind: str, rng: random.Random) -> float:
    """Half beyond the failure timeout, a fifth beyond the time after which a silent peer is dead, where a fault has a length."""
    if kind in ("kill", "router_restart", "drain"):
        return rng.uniform(1.0, 3.0)
    if kind == "move":
        return rng.uniform(0.0, 1.0)
    share = rng.random()
    if share < 0.2:
        return rng.uniform(DEATH_S + 0.1, 10.0)
    return (
        rng.uniform(FAILURE_TIMEOUT_S + 0.1, DEATH_S)
        if share < 0.5
        else rng.uniform(0.5, FAILURE_TIMEOUT_S)
    )


def _targets(kind: str) -> list[str]:
    if kind in ("link_down", "move", "multicast_off"):
        return [f"host {number}" for number in range(NUM_HOSTS)]
    if kind == "router_restart":
        return ["router-1", "router-2"]
    return [peer for peer, (_, role) in PEERS.items() if role not in ("frontend", "router")]


def number_of(target: str) -> int:
    """Of the host that a fault befalls."""
    return int(target.split()[1])
