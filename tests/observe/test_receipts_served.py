"""Receipts of a mesh of real processes: kept whatever a request ended in, found from everywhere, shown, counted and exported."""

import json
import re
import shlex
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

import meshserve.observe
from tests.harness import Process, meshserve_command, run_command, wait_until
from tests.harness.tmux import Screen, has_tmux

READY_S = 10.0
ALONE = ("--interface", "127.0.0.1", "--no-mdns", "--mesh", "receipts")
PROMPT = "The prompt of a long document that is worth handing over. " * 10
HTTP, GENERATION = "POST /v1/completions", "text_completion dummy"
"""Names of the spans of a frontend and a processor, by OpenTelemetry's conventions."""
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

needs_tmux = pytest.mark.skipif(not has_tmux(), reason="there is no tmux")


class Collector:
    """A little OpenTelemetry collector: takes spans, while it is told to."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                assert self.path == "/v1/traces" and self.headers["content-type"] == "application/json"
                for resource in body["resourceSpans"]:
                    for scope in resource["scopeSpans"]:
                        collector.spans += scope["spans"]
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *args: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def of(self, trace_id: str) -> dict[str, dict[str, Any]]:
        """Its spans so far, by name."""
        return {span["name"]: span for span in self.spans if span["traceId"] == trace_id}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@dataclass
class Served:
    """A mesh with two fronts; the second has no processor of its own."""

    front: httpx.Client
    other: httpx.Client
    seed: str
    collector: Collector
    unheard: Process
    """The second front, whose collector is not there."""

    def ask(self, label: str, **fields: Any) -> httpx.Response:
        client: httpx.Client = fields.pop("by", self.front)
        headers = {"x-request-id": label, **fields.pop("headers", {})}
        body = {"model": "dummy", "prompt": "Hello", "max_tokens": 8, "ignore_eos": True, **fields}
        return client.post("/v1/completions", json=body, headers=headers)

    def receipt(self, name: str, by: httpx.Client | None = None) -> dict[str, Any]:
        """A request's, once it is over."""

        def found() -> httpx.Response | None:
            response = (by or self.front).get(f"/mesh/requests/{name}")
            return response if response.status_code == 200 else None

        receipt: dict[str, Any] = wait_until(found, READY_S, f"{name} has a receipt").json()
        total_ms, phases = receipt["total_ms"], receipt["phases_ms"]
        assert min(phases.values()) >= 0 and sum(phases.values()) == pytest.approx(total_ms, abs=0.001)
        return receipt


def client_of(peer: Process) -> httpx.Client:
    """Keeps no connection: one that is made anew within a test looks like one that the test left behind."""
    return httpx.Client(base_url=peer.ready(READY_S)["http"], timeout=60.0, limits=httpx.Limits(max_keepalive_connections=0))


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with ExitStack() as stack:
        collector = Collector()
        stack.callback(collector.close)

        def run(role: str, *options: str) -> Process:
            return stack.enter_context(Process(meshserve_command("run", "--role", role, *ALONE, *options)))

        front = run("frontend,processor,router", "--name", "front", "--http", "127.0.0.1:0", "--otlp", collector.url)
        seed = front.ready(READY_S)["address"].removeprefix("tcp://")
        joining = ("--peer", seed)
        for role in ("decode", "decode", "prefill"):
            run(role, *joining, "--engine-opt", "step_ms=1")
        other = run("frontend", *joining, "--name", "other", "--http", "127.0.0.1:0", "--otlp", "http://127.0.0.1:9")
        front.wait_for_line("^2 decode, 1 prefill ready", READY_S)
        clients = [stack.enter_context(client_of(found)) for found in (front, other)]
        wait_until(lambda: clients[1].get("/ready").status_code == 200, READY_S, "the other front serves")
        prompts = (f"{number} {PROMPT}" for number in range(50))
        body = {"model": "dummy", "max_tokens": 1, "meshserve": {"receipt": True}}

        def is_handed_over() -> bool:
            answer = clients[0].post("/v1/completions", json={**body, "prompt": next(prompts)})
            return bool(answer.json()["meshserve"]["peers"]["prefill"])

        wait_until(is_handed_over, READY_S, "the workers have met")
        yield Served(clients[0], clients[1], seed, collector, other)


def test_a_receipt_is_found_by_either_name_from_every_front_and_has_the_http_part(served: Served) -> None:
    answer = served.ask("mine", prompt=f"mine {PROMPT}", meshserve={"receipt": True}).json()["meshserve"]
    for client in (served.front, served.other):
        for name in ("mine", answer["request_id"]):
            receipt = served.receipt(name, client)
            assert receipt["request_id"] == answer["request_id"] and receipt["client_id"] == "mine" and receipt["outcome"] == "ok"
            assert receipt["peers"] == answer["peers"] and receipt["peers"]["frontend"] == "front" and receipt["peers"]["prefill"]
            assert receipt["phases_ms"]["http"] > 0 and receipt["total_ms"] >= answer["total_ms"]
    assert served.ask("theirs", by=served.other).status_code == 200
    receipt = served.receipt("theirs")
    assert receipt["peers"]["frontend"] == "other" and receipt["peers"]["processor"] == "front"
    assert receipt["phases_ms"]["network"] > 0


def test_a_request_that_is_not_known_is_told_so(served: Served) -> None:
    answer = served.front.get("/mesh/requests/never-asked")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "request_not_found" and "kept" in answer.text


@pytest.mark.parametrize(
    ("label", "fields", "outcome", "processor"),
    [
        ("unread", {"max_tokens": -1}, "invalid_request", None),
        ("unknown", {"model": "gpt-9"}, "model_not_found", "front"),
        ("too-long", {"max_tokens": 131_072}, "context_length_exceeded", "front"),
        ("late", {"max_tokens": 10_000, "headers": {"x-request-timeout": "0.1"}}, "deadline_exceeded", "front"),
    ],
)
def test_what_fails_has_a_receipt_with_its_code(
    served: Served, label: str, fields: dict[str, Any], outcome: str, processor: str | None
) -> None:
    assert served.ask(label, **fields).status_code >= 400
    receipt = served.receipt(label)
    assert (receipt["outcome"], receipt["peers"]["processor"]) == (outcome, processor) and receipt["error"]


def test_what_is_stopped_or_cancelled_names_its_peers_and_where_its_time_went(served: Served) -> None:
    text = served.ask("whole", prompt=f"stop {PROMPT}", max_tokens=64).json()["choices"][0]["text"]

    def stopped_and_cached() -> dict[str, Any] | None:
        """Its receipt; the router learns of a worker's blocks a moment after the worker's answer."""
        stopped = served.ask("stopped", prompt=f"stop {PROMPT}", max_tokens=64, stop=[text[20:28]], meshserve={"receipt": True}).json()
        assert stopped["choices"][0]["finish_reason"] == "stop"
        receipt: dict[str, Any] = stopped["meshserve"]
        return receipt if receipt["tokens"]["cached"] else None

    assert wait_until(stopped_and_cached, READY_S, "its prompt is a prefix hit")["phases_ms"]["decode"] > 0
    body = {"model": "dummy", "prompt": f"cancelled {PROMPT}", "max_tokens": 10_000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{served.front.base_url}/v1/completions", json=body, headers={"x-request-id": "left"}) as response:
        assert next(response.iter_lines()).startswith("data: ")
    receipt = served.receipt("left")
    assert receipt["outcome"] == "cancelled" and receipt["peers"]["decode"] and receipt["peers"]["prefill"]
    assert receipt["phases_ms"]["decode"] > 0 and receipt["phases_ms"]["prefill"] > 0 and receipt["tokens"]["completion"] > 0


def test_what_its_first_token_stopped_names_who_prefilled_it(served: Served) -> None:
    stops = [" ", "e", "a", "o"]
    for number in range(40):  # whose first letter is one of these
        fields = {"prompt": f"{number} first {PROMPT}", "max_tokens": 1, "stop": stops, "meshserve": {"receipt": True}}
        answer = served.ask(f"first-{number}", **fields).json()
        if answer["choices"][0]["finish_reason"] == "stop":
            break
    assert answer["choices"][0]["finish_reason"] == "stop"
    receipt = answer["meshserve"]
    assert receipt["peers"]["prefill"] and receipt["kv"]["blocks"] and [attempt["outcome"] for attempt in receipt["attempts"]] == ["done"]


def test_several_answers_add_up_along_the_slowest_and_each_names_its_worker(served: Served) -> None:
    served.ask("several", prompt=f"several {PROMPT}", n=3, max_tokens=16)
    receipt = served.receipt("several")
    assert [choice["completion"] for choice in receipt["choices"]] == [16, 16, 16]
    assert all(choice["decode"] for choice in receipt["choices"]) and receipt["choices"][0]["prefill"] == receipt["peers"]["prefill"]
    assert receipt["phases_ms"]["decode"] > 0 and receipt["phases_ms"]["other"] < 0.25 * receipt["total_ms"]


def test_every_metric_of_the_grafana_dashboard_is_one_that_metrics_shows(served: Served) -> None:
    served.ask("measured", prompt=f"measured {PROMPT}", max_tokens=5)
    text = served.front.get("/metrics").text
    dashboard = json.loads((Path(meshserve.observe.__path__[0]) / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = {name for query in queries for name in re.findall(r"meshserve_\w+", query)}
    assert len(used) > 30 and not used - set(re.findall(r"^(meshserve_\w+)", text, re.MULTILINE))
    sums = {
        name: float(value)
        for name, value in re.findall(r'^(meshserve_\w+_(?:sum|count))\{[^}]*peer="front"[^}]*\} (\S+)$', text, re.MULTILINE)
    }
    assert sums["meshserve_time_to_first_token_seconds_count"] >= sums["meshserve_request_duration_seconds_count"] > 0
    assert sums["meshserve_inter_token_latency_seconds_count"] > 0
    mean_s = sums["meshserve_inter_token_latency_seconds_sum"] / sums["meshserve_inter_token_latency_seconds_count"]
    assert 0.0005 < mean_s < 0.1, "an engine with a step of 1 ms"


def test_spans_join_the_clients_trace_and_the_frontends_is_their_parent(served: Served) -> None:
    served.ask("traced", prompt=f"traced {PROMPT}", headers={"traceparent": TRACEPARENT})
    assert served.receipt("traced")["traceparent"] == TRACEPARENT
    trace_id = TRACEPARENT.split("-")[1]
    wanted = {HTTP, GENERATION, "meshserve.process", "meshserve.route", "meshserve.prefill", "meshserve.decode"}
    wait_until(lambda: wanted <= served.collector.of(trace_id).keys(), READY_S, "all its spans arrived")
    spans = served.collector.of(trace_id)
    assert spans[HTTP]["parentSpanId"] == TRACEPARENT.split("-")[2]
    assert spans[GENERATION]["parentSpanId"] == spans[HTTP]["spanId"]
    of_phases = [spans[name] for name in wanted - {HTTP, GENERATION}]
    assert {span["parentSpanId"] for span in of_phases} == {spans[GENERATION]["spanId"]}
    served.ask("unsampled", headers={"traceparent": TRACEPARENT.replace("4bf9", "4bfa")[:-1] + "0"})
    served.ask("ours")
    own_trace = served.receipt("ours")["traceparent"].split("-")[1]
    wait_until(lambda: GENERATION in served.collector.of(own_trace), READY_S, "the next request's spans arrived")
    assert not served.collector.of(trace_id.replace("4bf9", "4bfa")), "whoever began that trace does not want it recorded"


def test_a_collector_that_is_not_there_costs_a_counted_drop_and_one_warning(served: Served) -> None:
    def num_dropped() -> int:
        peers = served.front.get("/mesh/peers").json()
        return int(next(peer for peer in peers if peer["name"] == "other")["counters"].get("otlp_requests_dropped", 0))

    for number in (1, 2):
        before = num_dropped()
        assert served.ask(f"unheard-{number}", by=served.other).status_code == 200
        wait_until(lambda before=before: num_dropped() > before, READY_S, "a drop is counted")  # type: ignore[misc]
    assert served.unheard.stderr_text.count("takes no spans") == 1


def trace(served: Served, *arguments: str) -> list[str]:
    return meshserve_command("trace", *arguments, "--interface", "127.0.0.1", "--no-mdns", "--mesh", "receipts", "--peer", served.seed)


def test_trace_prints_plain_text_to_a_pipe_and_json_on_demand(served: Served) -> None:
    served.ask("shown", prompt=f"shown {PROMPT}")
    shown = run_command(trace(served, "shown"))
    assert shown.exit_code == 0 and "\x1b" not in shown.stdout and not shown.stderr
    assert all(word in shown.stdout for word in ("shown  ok", "front ->", "decode ", "DECODE CANDIDATES", "ATTEMPT BY"))
    for arguments in (("--last", "--json"), ("shown", "--json")):
        receipt = json.loads(run_command(trace(served, *arguments)).stdout)
        assert receipt["client_id"] == "shown" and receipt["peers"]["frontend"] == "front"
    lost = run_command(trace(served, "never-asked"))
    assert lost.exit_code == 1 and "\n" not in lost.stderr and "never-asked" in lost.stderr
    assert run_command(trace(served)).exit_code == run_command(trace(served, "shown", "--last")).exit_code == 2


@needs_tmux
@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50)])
def test_a_trace_fits_its_terminal(served: Served, width: int, height: int, tmp_path: Path) -> None:
    served.ask("fits", prompt=f"{width} {PROMPT}")
    with Screen(["sh", "-c", f"{shlex.join(trace(served, 'fits'))} && read line"], width, height, tmp_path) as screen:
        screen.wait_for("PREFILL CANDIDATES")
        lines = screen.wait_for("fits  ok")
        screen.press("Enter")
        assert screen.wait_for_end() == 0
        assert all(len(line) <= width for line in lines)
        phases = [line for line in lines if re.match(r"(http|process|route|prefill|decode|network) +\d", line)]
        assert len(phases) == 6 and all(re.search("[▏▎▍▌▋▊▉█]", line) for line in phases)


@needs_tmux
def test_top_shows_the_last_request(served: Served, tmp_path: Path) -> None:
    served.ask("before-it")
    served.ask("topmost")
    command = meshserve_command("top", *ALONE, "--peer", served.seed, "--interval", "0.2")
    with Screen(command, 80, 24, tmp_path) as screen:
        screen.wait_for("PEER")
        screen.press("t")
        screen.wait_for("topmost  ok")
        screen.press("Left")
        screen.wait_for("before-it  ok")
        assert any(line.startswith("2 of the last ") for line in screen.lines())
        screen.press("Right")
        screen.wait_for("topmost  ok")
        screen.press("Escape")
        screen.wait_for("↑PEER")
        screen.press("q")
        assert screen.wait_for_end() == 0


def test_without_observing_nothing_is_kept_and_receipts_in_answers_still_come() -> None:
    options = ("--interface", "127.0.0.1", "--no-mdns", "--mesh", "blind", "--http", "127.0.0.1:0", "--no-observe")
    with Process(meshserve_command("run", "--role", "all", *options)) as peer:
        with httpx.Client(base_url=peer.ready(READY_S)["http"], timeout=60.0) as client:
            body = {"model": "dummy", "prompt": "Hello", "max_tokens": 4, "meshserve": {"receipt": True}}
            receipt = client.post("/v1/completions", json=body).json()["meshserve"]
            assert receipt["peers"]["decode"] and sum(receipt["phases_ms"].values()) == pytest.approx(receipt["total_ms"], abs=0.001)
            assert client.get(f"/mesh/requests/{receipt['request_id']}").status_code in (404, 405)
            assert client.get("/metrics").status_code == 404
        peer.terminate()
        assert peer.wait() == 0


@pytest.mark.parametrize("options", [("--otlp", "localhost:4318"), ("--otlp", "http://localhost:4318", "--no-observe")])
def test_otlp_without_a_url_or_without_spans_is_a_usage_error(options: tuple[str, ...]) -> None:
    done = run_command(meshserve_command("run", "--role", "all", *options))
    assert done.exit_code == 2 and "--otlp" in done.stderr and "\n" not in done.stderr
