"""What a peer logs while others come, go and fail: a line for each event, and nothing by default."""

import http.client
import json
import threading
from typing import Any
from urllib.parse import urlsplit

from tests.harness import Process
from tests.harness.processes import meshserve_command

READY_S = 10.0
ALONE = ("--interface", "127.0.0.1", "--no-mdns")


def run(role: str, name: str, *options: str) -> Process:
    return Process(meshserve_command("run", "--role", role, "--name", name, *ALONE, *options))


def events(process: Process) -> list[dict[str, Any]]:
    return [entry for line in process.stderr if line.text.startswith("{") and "event" in (entry := json.loads(line.text))]


def complete(url: str, answers: list[tuple[int, str]]) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60.0)
    connection.request("POST", "/v1/completions", json.dumps({"model": "dummy", "prompt": "hi", "max_tokens": 1000}))
    response = connection.getresponse()
    answers.append((response.status, response.getheader("x-request-id") or ""))
    response.read()
    connection.close()


def test_events_worth_a_persons_time_are_a_line_each_with_request_ids() -> None:
    with run("frontend,processor,router", "front", "--http", "127.0.0.1:0", "--log-level", "info", "--log-json") as front:
        ready = front.ready(READY_S)
        seed = ready["address"].removeprefix("tcp://")
        with run("decode", "quiet", "--peer", seed, "--engine-opt", "step_ms=50") as worker:
            front.wait_for_line("^1 decode", READY_S)
            answers: list[tuple[int, str]] = []
            asking = threading.Thread(target=complete, args=(ready["http"], answers))
            asking.start()
            with run("prefill", "second", "--peer", seed, "--log-level", "info") as second:
                second.ready(READY_S)
                front.wait_for_line("peer_joined.*second", READY_S)
                second.terminate()
                assert second.wait() == 0
                assert second.find_line(" INFO: drain: no new work") and second.find_line(" INFO: drain: all that ran is done")
            worker.kill()
            front.wait_for_line("request_failed", READY_S)
            asking.join(READY_S)
            assert worker.stderr_text.startswith("meshserve: OPEN MESH") and len(worker.stderr) == 1
        front.wait_for_line("peer_died.*quiet|quiet.*peer_died", READY_S)
        found = {entry["event"]: entry for entry in events(front) if entry.get("peer") != "second" or entry["event"] == "peer_joined"}
        assert all(line.text.startswith("{") for line in front.stderr), "every line is JSON"
        assert found["open_mesh"]["level"] == "warning" and "OPEN MESH" in found["open_mesh"]["message"]
        assert found["peer_joined"]["peer"] in ("quiet", "second") and found["peer_joined"]["address"].startswith("tcp://127.0.0.1:")
        assert found["peer_died"]["peer"] == "quiet" and found["peer_died"]["level"] == "info"
        ((status, request_id),) = answers
        assert status >= 500 and found["request_failed"]["request_id"] and found["request_failed"]["code"]
        assert request_id in (found["request_failed"]["request_id"], found["request_failed"]["client_id"])
        assert len(events(front)) < 12  # nothing per token
