"""`python -m bench.chaos --seed N --seconds S`: a mesh on five hosts under faults, and what its clients notice of them.

Five network namespaces on one switch, real processes: 3 decode, 2 prefill, 2 routers, 2 processors, and the clients'
frontend. Every two seconds one of these befalls a host or a peer: kill (and a new start after 1 to 3 s), stop (0.5 to 10 s), link
down (0.5 to 10 s), another address, multicast off, a router that is restarted, a drain. At each moment one decode worker,
one router and one processor are alive and reachable. Sixteen clients ask all the while, half of them for streams, and
compare each answer with that of an undisturbed peer. A seed repeats its faults.
"""

import contextlib
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from bench.fault_plan import NUM_HOSTS, PEERS, Fault, number_of, plan
from tests.harness import Host, Lan, Process, pace
from tests.harness.held import held
from tests.harness.leaks import prepare

NUM_CLIENTS = 16
STREAM_TOKENS, WHOLE_TOKENS = 200, 24
_ANSWER_TIMEOUT_S = 120.0
_WARM_UP_S = 5.0
"""Of requests without faults: peers then have all connections that they make for work."""
_HTTP = "http://127.0.0.1:8000"
_PACE = ("--engine-opt", "profile=reference")


# --- the mesh, and what befalls it


class Mesh:
    """The hosts and processes. Peers are started again as their faults ask for it."""

    def __init__(self, lan: Lan, record: Path | None) -> None:
        self._record = () if record is None else ("--record", str(record))
        self.hosts = [lan.add_host() for _ in range(NUM_HOSTS)]
        self.processes: dict[str, Process] = {}
        self.num_moves = 0
        for peer in PEERS:
            self.start(peer)
        for process in self.processes.values():
            process.ready(30.0)

    def start(self, peer: str) -> None:
        number, role = PEERS[peer]
        workers = _PACE if role in ("decode", "prefill") else ()
        self.processes[peer] = self.hosts[number].run("--role", role, "--name", peer, "--drain-timeout", "5", *workers, *self._record)

    def begin(self, fault: Fault) -> None:
        """The fault begins."""
        if fault.target.startswith("host"):
            host = self.hosts[number_of(fault.target)]
            if fault.kind == "link_down":
                host.link_down()
            elif fault.kind == "multicast_off":
                host.block_multicast()
            else:
                self._move(host)
            return
        process = self.processes[fault.target]
        if fault.kind == "stop":
            process.stop()
        elif fault.kind == "drain":
            process.terminate()
        else:
            process.kill()

    def end(self, fault: Fault) -> None:
        """The fault is over."""
        if fault.kind == "link_down":
            self.hosts[number_of(fault.target)].link_up()
        elif fault.kind == "multicast_off":
            self.hosts[number_of(fault.target)].unblock()
        elif fault.kind == "stop":
            self.processes[fault.target].resume()
        elif fault.kind != "move":
            self.processes[fault.target].wait(20.0)
            self.start(fault.target)

    def _move(self, host: Host) -> None:
        self.num_moves += 1
        old, host.address = host.address, f"10.77.{100 + self.num_moves // 200}.{self.num_moves % 200 + 1}"
        host.remove_address(f"{old}/16")
        host.add_address(f"{host.address}/16")

    def peers(self) -> list[dict[str, Any]]:
        """What `/mesh/peers` says."""
        found: list[dict[str, Any]] = self.hosts[0].get(f"{_HTTP}/mesh/peers").json()
        return found

    def uses(self) -> dict[str, int]:
        """Open descriptors and background tasks of each peer."""
        found = {f"{peer['name']}: background tasks": int(peer["held"]["tasks"]) for peer in self.peers()}
        for name, process in self.processes.items():
            found[f"{name}: descriptors"] = _num_descriptors(process.pid)
        return found


_SYN_SENT = "02"


def _num_descriptors(pid: int) -> int:
    """Without those of dials that have no answer yet: a peer looks out for members that fell silent, and dials them now and then for
    minutes."""
    tables = [Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    sockets = [line.split() for lines in tables for line in lines]
    dials = {f"socket:[{fields[9]}]" for fields in sockets if fields[3] == _SYN_SENT}
    num = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            num += str(descriptor.readlink()) not in dials
    return num


class Faults(threading.Thread):
    """Carries the plan out."""

    def __init__(self, mesh: Mesh, faults: list[Fault]) -> None:
        super().__init__()
        self._mesh, self.plan = mesh, faults
        self.error: BaseException | None = None

    def run(self) -> None:
        """Begin and end each fault at its time."""
        steps = sorted(
            [(fault.at_s, 0, fault) for fault in self.plan] + [(fault.at_s + fault.lasts_s, 1, fault) for fault in self.plan],
            key=lambda step: step[:2],
        )
        began_at = time.monotonic()
        try:
            for at_s, is_end, fault in steps:
                pace(max(0.0, began_at + at_s - time.monotonic()))
                (self._mesh.end if is_end else self._mesh.begin)(fault)
        except BaseException as error:
            self.error = error


# --- the clients


@dataclass
class Seen:
    """What the clients saw, all together."""

    num_right: int = 0
    num_hung: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    num_migrated: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def num_asked(self) -> int:
        """In all."""
        return self.num_right + len(self.wrong) + self.num_hung + sum(self.errors.values())

    @property
    def is_bad(self) -> bool:
        """Whether clients saw what a mesh must not show: a wrong answer, one past its deadline, over a clear error in a thousand."""
        return bool(self.wrong or self.num_hung or sum(self.errors.values()) > 0.001 * self.num_asked)


class Clients:
    """Ask until they are told to end."""

    def __init__(self, host: Host, expected: dict[tuple[str, int], str]) -> None:
        self._host, self._expected = host, expected
        self.seen = Seen()
        self.is_over = threading.Event()
        self._lock = threading.Lock()

    def ask_while(self, wait: Callable[[], None]) -> None:
        """All clients ask until `wait` returns, and read their last answers to the end."""
        self.is_over.clear()
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            running = [pool.submit(self.run, number) for number in range(NUM_CLIENTS)]
            wait()
            self.is_over.set()
            for client in running:
                client.result()

    def run(self, number: int) -> None:
        """One client: streams, if its number is even."""
        rng = random.Random(number)
        is_stream = number % 2 == 0
        mine = [key for key in self._expected if key[1] == (STREAM_TOKENS if is_stream else WHOLE_TOKENS)]
        while not self.is_over.is_set():
            key = rng.choice(mine)
            body = {"model": "dummy", "prompt": key[0], "max_tokens": key[1], "ignore_eos": True, "stream": is_stream}
            body["meshserve"] = {"receipt": True}
            began_at = time.monotonic()
            try:
                text, receipt, error = self._stream(body) if is_stream else self._whole(body)
            except (OSError, AssertionError) as failure:
                text, receipt, error = "", {}, f"{type(failure).__name__}: {str(failure)[:80]}"
            with self._lock:
                self._count(key, text, receipt, error, time.monotonic() - began_at)

    def _count(self, key: tuple[str, int], text: str, receipt: dict[str, Any], error: str, took_s: float) -> None:
        self.seen.num_migrated += bool(receipt.get("migrations"))
        if took_s > _ANSWER_TIMEOUT_S:
            self.seen.num_hung += 1
        elif error:
            self.seen.errors[error] += 1
        elif text == self._expected[key]:
            self.seen.num_right += 1
        else:
            self.seen.wrong.append(f"{key[0][:40]!r}: {text!r} instead of {self._expected[key]!r}")

    def _whole(self, body: dict[str, Any]) -> tuple[str, dict[str, Any], str]:
        response = self._host.post_json(f"{_HTTP}/v1/completions", body, timeout_s=2 * _ANSWER_TIMEOUT_S)
        answer = response.json()
        if response.status != 200:
            return "", {}, f"{response.status} {answer['error']['code']}: {answer['error']['message']}"
        return answer["choices"][0]["text"], answer["meshserve"], ""

    def _stream(self, body: dict[str, Any]) -> tuple[str, dict[str, Any], str]:
        texts: list[str] = []
        receipt: dict[str, Any] = {}
        with self._host.stream("POST", f"{_HTTP}/v1/completions", body, timeout_s=2 * _ANSWER_TIMEOUT_S) as lines:
            for fields in _events(lines):
                if "error" in fields:
                    return "", receipt, f"stream {fields['error'].get('code')}: {fields['error'].get('message')}"
                texts += [choice["text"] for choice in fields.get("choices", ())]
                receipt = fields.get("meshserve") or receipt
        return "".join(texts), receipt, ""


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:  # others than data are comments, which show that the stream lives
        data = line.removeprefix("data: ").strip() if line.startswith("data: ") else ""
        if data and data != "[DONE]":
            yield json.loads(data)


def undisturbed(lan: Lan) -> dict[tuple[str, int], str]:
    """What a peer alone answers to each prompt."""
    host = lan.add_host()
    host.run("--role", "all", "--mesh", "undisturbed").wait_for_line("^1 decode, 1 prefill ready", 30.0)
    long = "It is a long document, and worth handing over. " * 12
    prompts = [(f"{number} {long if number % 3 else ''}", STREAM_TOKENS if number % 2 else WHOLE_TOKENS) for number in range(60)]

    def ask(key: tuple[str, int]) -> str:
        body = {"model": "dummy", "prompt": key[0], "max_tokens": key[1], "ignore_eos": True}
        return str(host.post_json(f"{_HTTP}/v1/completions", body).json()["choices"][0]["text"])

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(prompts, pool.map(ask, prompts), strict=True))


@dataclass(frozen=True)
class Outcome:
    """Of one run."""

    seed: int
    seconds: float
    faults: dict[str, int]
    seen: Seen
    left: dict[str, int]
    """What peers still held when all was over, and how many descriptors and tasks more than at the
    beginning."""
    is_whole: bool
    """Whether all peers knew all others again."""


def run(lan: Lan, seed: int, seconds: float, record: Path | None = None) -> Outcome:
    """Faults for so many seconds, then peace until everything is back where it began. `record`: a
    file for what happened to each request.
    """
    expected = undisturbed(lan)
    mesh = Mesh(lan, record)
    _until(lambda: _is_whole(mesh), 30.0)
    clients, faults = Clients(mesh.hosts[0], expected), Faults(mesh, plan(seed, seconds))
    clients.ask_while(lambda: pace(_WARM_UP_S))
    _until(lambda: not held(mesh.peers()), 15.0)
    uses = mesh.uses()
    faults.start()
    clients.ask_while(faults.join)
    if faults.error is not None:
        raise faults.error
    is_whole = _until(lambda: _is_whole(mesh), 30.0)
    _until(lambda: not _left(mesh, uses), 15.0)
    assert not lan.tracebacks(), lan.tracebacks()[0]
    kinds = dict(Counter(fault.kind for fault in faults.plan))
    return Outcome(seed, seconds, kinds, clients.seen, _left(mesh, uses), is_whole)


def _left(mesh: Mesh, uses: dict[str, int]) -> dict[str, int]:
    """What is still held, and what is used beyond what was used before."""
    more = {name: level - uses.get(name, 0) for name, level in mesh.uses().items()}
    return held(mesh.peers()) | {name: count for name, count in more.items() if count > 0}


def _is_whole(mesh: Mesh) -> bool:
    peers = mesh.peers()
    return len(peers) == len(PEERS) and all(peer["num_reached"] == len(PEERS) - 1 for peer in peers)


def _until(condition: Any, most_s: float) -> bool:
    ends_at = time.monotonic() + most_s
    while not (is_true := condition()) and time.monotonic() < ends_at:
        pace(0.2)
    return bool(is_true)


@click.command()
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--seconds", type=float, default=600.0, show_default=True)
@click.option("--record", type=click.Path(path_type=Path), help="A file for what happened to each request.")
@click.option("--json", "is_json", is_flag=True)
def main(seed: int, seconds: float, record: Path | None, is_json: bool) -> None:
    """Disturb a mesh, and print what its clients saw."""
    prepare()  # the harness adopts the processes that it starts
    with Lan() as lan:
        outcome = run(lan, seed, seconds, record)
    if is_json:
        print(json.dumps(asdict(outcome)))
    else:
        seen = outcome.seen
        print(f"faults: {', '.join(f'{count} {kind}' for kind, count in sorted(outcome.faults.items()))}")
        print(f"{seen.num_asked} requests: {seen.num_right} right ({seen.num_migrated} went on at another worker),")
        print(f"{len(seen.wrong)} wrong, {seen.num_hung} past their deadline, {sum(seen.errors.values())} clear errors {dict(seen.errors)}")
        print(f"afterwards: {'whole' if outcome.is_whole else 'NOT WHOLE'}, held: {outcome.left or 'nothing'}")
        for wrong in seen.wrong[:5]:
            print(f"wrong: {wrong}")
    sys.exit(0 if outcome.is_whole and not outcome.left and not outcome.seen.is_bad else 1)


if __name__ == "__main__":
    main()
