"""What a peer says to the people at its terminal."""

import json
import os
import re
import signal
import threading
import urllib.error
import urllib.request

import pytest

from meshserve.config import PROTOCOL_MAJOR
from meshserve.errors import HandshakeRefused
from meshserve.mesh.handshake import check_hello
from meshserve.mesh.hearsay import Dial
from meshserve.mesh.network import parse_host_port
from meshserve.mesh.sightings import Sightings
from meshserve.wire.hello import Hello, PeerInfo
from tests.cli.test_logs import ALONE, READY_S, run
from tests.harness import Process, run_command, wait_until
from tests.harness.processes import meshserve_command


def named(name: str, mesh: str = "default") -> PeerInfo:
    return PeerInfo(name, name, mesh, ("decode",), ("10.0.0.2",), 7800, "1")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("tcp://10.0.0.2:7804", ("10.0.0.2", 7804)),
        ("tcp://[fd77::2]:7804", ("fd77::2", 7804)),
        ("tcp://there", ("there", 7800)),
        ("there:7804", ("there", 7804)),
    ],
)
def test_a_peer_is_named_by_what_the_ready_line_prints(text: str, found: tuple[str, int]) -> None:
    assert parse_host_port(text, 7800) == found


def test_the_address_of_the_ready_line_joins_twins_warn_on_both_sides_and_the_workers_line_says_who_left_and_why() -> None:
    front = run("frontend,processor,router", "front", "--http", "127.0.0.1:0")
    with front:
        ready = front.ready(READY_S)
        first, second = (run("decode", "twin", "--peer", ready["address"]) for _ in range(2))
        with first, second:
            front.wait_for_line("^2 decode, 0 prefill ready: twin, twin~", READY_S)
            for twin in (first, second):
                twin.wait_for_line("WARNING: another peer is called twin too", READY_S)
            second.kill()
            front.wait_for_line(r"^1 decode, 0 prefill ready: twin.* \(twin.* (lost its connection|ended without goodbye)\)", READY_S)
            first.terminate()
            front.wait_for_line(r"^no workers: .* \(twin.* is draining\)", READY_S)
            assert first.wait() == 0
    assert "keys differ" not in front.stderr_text + first.stderr_text
    assert "cannot join" not in front.stderr_text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_drain_says_what_it_waits_for(number: int) -> None:
    with run("all", "alone", "--http", "127.0.0.1:0", "--engine-opt", "step_ms=2") as peer:
        url = peer.ready(READY_S)["http"]
        texts: list[str] = []
        asking = threading.Thread(target=lambda: texts.append(text_of_many_tokens(url)))
        asking.start()
        wait_until_busy(url)
        os.kill(peer.pid, number)
        peer.wait_for_line("WARNING: drain: waiting for requests under way .*decode 1.*at most .* s more", READY_S)
        assert peer.wait() == 0
        asking.join(READY_S)
        assert texts[0]


def text_of_many_tokens(url: str) -> str:
    """Takes some two seconds at 2 ms a token."""
    body = {"model": "dummy", "prompt": "hi", "max_tokens": 1000, "ignore_eos": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return str(json.load(response)["choices"][0]["text"])


def wait_until_busy(url: str) -> None:
    def running() -> int:
        with urllib.request.urlopen(f"{url}/mesh/peers") as response:
            return int(json.load(response)[0]["load"]["num_running"])

    wait_until(running, READY_S, "the request runs")


def test_under_nohup_the_end_of_the_terminal_changes_nothing() -> None:
    command = meshserve_command("run", "--role", "decode", *ALONE)
    with Process(["nohup", *command]) as peer:
        peer.ready(READY_S)
        os.kill(peer.pid, signal.SIGHUP)
        peer.terminate()
        assert peer.wait() == 0


@pytest.mark.parametrize(("major", "older"), [(PROTOCOL_MAJOR - 1, "laptop"), (PROTOCOL_MAJOR + 1, "server")])
def test_of_two_versions_the_older_side_is_told_to_upgrade(major: int, older: str) -> None:
    hello = {**Hello(named("laptop"), 1.0, ()).to_wire(), "protocol": [major, 3]}
    with pytest.raises(HandshakeRefused) as refused:
        check_hello(hello, named("server"))
    assert refused.value.message.endswith(f": upgrade meshserve of {older}")


def test_a_peer_of_another_mesh_is_refused_in_words_that_are_true_on_both_sides() -> None:
    with pytest.raises(HandshakeRefused) as refused:
        check_hello(Hello(named("laptop", "two"), 1.0, ()).to_wire(), named("server", "one"))
    assert refused.value.message == "server belongs to the mesh 'one', laptop to 'two'"


def test_a_peer_that_cannot_be_reached_is_warned_of_at_growing_pauses_with_a_count() -> None:
    seen = Sightings()
    said = [(at_s, times) for at_s in range(0, 7200, 5) if (times := seen.not_reached("10.0.0.2:7800", float(at_s)))]
    assert said == [(0, 1), (60, 13), (660, 133), (4260, 853)]
    seen.reached(Dial("", ("10.0.0.2",), 7800, None))
    assert seen.not_reached("10.0.0.2:7800", 7200.0) == 1


def test_two_models_under_one_name_are_told_apart_by_their_hashes_and_said_loudly() -> None:
    with run("frontend,processor,router", "front", "--http", "127.0.0.1:0") as front:
        ready = front.ready(READY_S)
        served = ("--served-model-name", "chat", "--peer", ready["address"])
        with run("decode", "one", "--model", "first", *served), run("decode", "two", "--model", "second", *served):
            front.wait_for_line("WARNING: 2 different models are called 'chat': .{8} at (one; .{8} at two|two; .{8} at one)", READY_S)
            with urllib.request.urlopen(f"{ready['http']}/v1/models") as response:
                entry, *exact = json.load(response)["data"]
            assert entry["id"] == "chat" and [found["workers"] for found in entry["variants"]] == [1, 1]
            assert len({found["model_hash"] for found in entry["variants"]}) == 2
            shown = run_command(meshserve_command("peers", *ALONE, "--peer", ready["address"]))
            assert set(re.findall("chat#[0-9a-f]{8}", shown.stdout)) == {found["id"] for found in exact}, shown.stdout
            assert len(exact) == 2


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_member_that_does_not_answer_is_marked_and_not_left_out() -> None:
    with run("frontend,processor,router", "front", "--http", "127.0.0.1:0") as front:
        seed = front.ready(READY_S)["address"]
        with run("decode", "asleep", "--peer", seed) as worker:
            front.wait_for_line("^1 decode", READY_S)
            worker.stop()
            front.wait_for_line(r"^no workers: .*\(asleep is silent\)", READY_S)
            shown = run_command(meshserve_command("peers", *ALONE, "--peer", seed))
            assert re.search(r"asleep +decode .* suspect", shown.stdout), shown.stdout
            wait_until(lambda: status_of(f"{front.ready(READY_S)['http']}/ready") == 503, READY_S, "nobody waits for it any more")
            worker.resume()
            wait_until(lambda: status_of(f"{front.ready(READY_S)['http']}/ready") == 200, READY_S, "it is there again")
