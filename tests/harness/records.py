"""The record of a mesh under test: every submit, ticket, claim, block, ack and result of all its peers, and the laws that it must obey."""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Event:
    """One line of a record. `at_s` is of the host's monotonic clock, `peer` an incarnation."""

    at_s: float
    peer: str
    event: str
    request: str
    details: dict[str, Any]


class Record:
    """All events of a run, in order of time. Peers are started with `--record` and one path for all of them."""

    def __init__(self, path: Path) -> None:
        text = path.read_text()
        lines = text[: text.rfind("\n") + 1].splitlines()  # the last one may be half written at this moment
        self.events = sorted((_event(json.loads(line)) for line in lines), key=lambda event: event.at_s)

    def of(self, *kinds: str) -> list[Event]:
        """Those of these kinds."""
        return [event for event in self.events if event.event in kinds]

    def check(self) -> None:
        """Fail with what is wrong. Laws hold for every request, whatever died."""
        faults = [*_results(self), *_tokens(self), *_claims(self), *_blocks(self), *_acks(self)]
        assert not faults, f"{len(faults)} faults in the record, the first: " + "; ".join(faults[:5])

    def busy_s(self, peer: str) -> list[tuple[float, float]]:
        """When this prefill worker computed or sent: from each granted claim to its end, or to the end of the record."""
        began: dict[tuple[str, int], float] = {}
        spans: list[tuple[float, float]] = []
        for event in self.events:
            key = (event.request, event.details.get("attempt", 0))
            if event.peer == peer and event.event == "prefill_begun":
                began[key] = event.at_s
            elif event.peer == peer and event.event == "prefill_ended" and key in began:
                spans.append((began.pop(key), event.at_s))
        return spans + [(at_s, self.events[-1].at_s) for at_s in began.values()]


def _event(line: dict[str, Any]) -> Event:
    known = {key: line.pop(key) for key in ("at_s", "peer", "event", "request")}
    return Event(**known, details=line)


def _results(record: Record) -> list[str]:
    """Each accepted request ends exactly once; one whose processor was lost, and that was started over under another name, at most once."""
    submits = Counter(event.request for event in record.of("submit"))
    results = Counter(event.request for event in record.of("result"))
    left = {event.details["before"] for event in record.of("started_over")}
    return [f"{request} was submitted {count} times" for request, count in submits.items() if count != 1] + [
        f"{request} ended {results[request]} times"
        for request in submits
        if results[request] != 1 and (results[request] or request.partition("/")[0] not in left)
    ]


def _tokens(record: Record) -> list[str]:
    """No token twice, none missing, and as many as the result says."""
    faults, position = [], Counter[str]()
    for event in record.of("tokens", "result"):
        if event.event == "tokens":
            if event.details["position"] != position[event.request]:
                faults.append(f"{event.request} got tokens from {event.details['position']} on after {position[event.request]}")
            position[event.request] += event.details["count"]
        elif event.details["num_tokens"] != position[event.request]:
            faults.append(f"{event.request} ended with {event.details['num_tokens']} tokens, and {position[event.request]} came")
    return faults


def _claims(record: Record) -> list[str]:
    """An attempt is granted once, one at a time, and to nobody who had the task before, unless it was the link that failed."""
    faults: list[str] = []
    holder: dict[tuple[str, str], str] = {}
    had: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for event in record.of("claim", "attempt_failed", "handoff_ended"):
        key = (event.peer, event.request)
        if event.event != "claim":
            failed = holder.pop(key, None)
            if event.details.get("outcome") in ("its link broke", "peer silent"):
                had[key].discard(failed or "")
            continue
        claiming = event.details["peer_claiming"]
        if key in holder:
            faults.append(f"{event.request} was given to {claiming} while {holder[key]} had it")
        if claiming in had[key]:
            faults.append(f"{event.request} was given to {claiming} twice")
        holder[key] = claiming
        had[key].add(claiming)
    return faults


def _blocks(record: Record) -> list[str]:
    """A block is taken from who has the task at that moment, once; a finished handoff is followed by no block."""
    faults: list[str] = []
    holder: dict[tuple[str, str], tuple[str, int]] = {}
    taken: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for event in record.of("claim", "attempt_failed", "handoff_ended", "block"):
        key, details = (event.peer, event.request), event.details
        if event.event == "claim":
            holder[key] = (details["peer_claiming"], details["attempt"])
        elif event.event != "block":
            holder.pop(key, None)
        elif holder.get(key) != (details["peer_sending"], details["attempt"]):
            faults.append(f"block {details['index']} of {event.request} was taken from {details['peer_sending']}, who has no claim")
        elif details["index"] in taken[key]:
            faults.append(f"block {details['index']} of {event.request} was taken twice")
        else:
            taken[key].add(details["index"])
    return faults


def _acks(record: Record) -> list[str]:
    """What is acknowledged was sent before."""
    sent: Counter[tuple[str, str, int]] = Counter()
    faults = []
    for event in record.of("blocks_sent", "ack"):
        key = (event.peer, event.request, event.details["attempt"])
        if event.event == "blocks_sent":
            sent[key] += 1
        elif not sent[key]:
            faults.append(f"{event.request} was acknowledged to {event.peer} without a block")
        else:
            sent[key] -= 1
    return faults
