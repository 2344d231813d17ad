"""A stream shows that it lives before its first token, and while nothing comes for it."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import anthropic
import httpx
import openai
import pytest

from meshserve.roles.frontend.liveness import HEAD_BY_S, Pauses
from tests.harness import Process, meshserve_command, wait_until
from tests.roles.frontends import Frontend, error_of, started

PATHS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "dummy", "prompt": "a" * 60, "max_tokens": 2, "stream": True},
    "/v1/chat/completions": {
        "model": "dummy",
        "messages": [{"role": "user", "content": "b" * 60}],
        "max_tokens": 2,
        "stream": True,
    },
    "/v1/responses": {"model": "dummy", "input": "c" * 60, "max_output_tokens": 2, "stream": True},
    "/v1/messages": {
        "model": "dummy",
        "messages": [{"role": "user", "content": "d" * 60}],
        "max_tokens": 2,
        "stream": True,
    },
    "/generate": {"prompt": "e" * 60, "request_id": "mine"},
}
PINGS = {
    "/v1/messages": 'event: ping\ndata: {"type":"ping"}\n\n',
    "/generate": '{"request_id":"mine","text":""}\n',
}


@pytest.fixture(scope="module")
def slow() -> Iterator[Frontend]:
    """Its prompts take some 4 s."""
    yield from started(
        "--mesh",
        "frontend-slow-streams",
        "--stream-ping",
        "1",
        "--engine-opt",
        "prefill_tokens_per_s=15",
    )


@pytest.mark.parametrize("path", PATHS)
def test_a_long_prefill_has_its_head_first_and_then_pings_until_the_first_token(
    slow: Frontend, path: str
) -> None:
    with slow.client.stream("POST", path, json=PATHS[path]) as response:
        assert response.status_code == 200 and response.headers["x-request-id"]
        assert slow.running() == 1, "the head came before the first token"
        text = "".join(response.iter_text())
    ping = PINGS.get(path, ": ping\n\n")
    assert text.startswith(2 * ping) and not text.endswith(ping), text
    assert '"error":{' not in text and text.count("\n") > 3 + text.count(ping) * ping.count("\n")


def test_official_clients_pass_over_pings_and_raise_what_fails_after_them(slow: Frontend) -> None:
    with openai.OpenAI(base_url=f"{slow.url}/v1", api_key="none", max_retries=0) as client:
        chat = {
            **PATHS["/v1/chat/completions"],
            "messages": [{"role": "user", "content": "h" * 60}],
        }
        with client.chat.completions.create(**chat) as chunks:
            assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
        late = client.completions.create(
            **{**PATHS["/v1/completions"], "prompt": "i" * 60},
            extra_headers={"x-request-timeout": "2"},
        )
        with late, pytest.raises(openai.APIError, match="deadline"):
            list(late)
    with anthropic.Anthropic(base_url=slow.url, api_key="none", max_retries=0) as other:
        asked: dict[str, Any] = {
            "model": "dummy",
            "max_tokens": 2,
            "messages": [{"role": "user", "content": "j" * 60}],
        }
        with other.messages.stream(**asked) as events:
            assert events.get_final_message().stop_reason == "max_tokens"
        asked["messages"] = [{"role": "user", "content": "k" * 60}]
        with (
            pytest.raises(anthropic.APIStatusError, match="deadline"),
            other.messages.stream(**asked, extra_headers={"x-request-timeout": "2"}) as events,
        ):
            events.until_done()
    wait_until(lambda: slow.running() == 0, 20.0, "the worker is free again")


def test_what_fails_after_the_head_is_an_error_event_and_before_it_a_status(slow: Frontend) -> None:
    body = {**PATHS["/v1/completions"], "prompt": "f" * 60}
    with slow.client.stream(
        "POST", "/v1/completions", json=body, headers={"x-request-timeout": "2"}
    ) as response:
        assert response.status_code == 200
        events = [
            line
            for line in "".join(response.iter_text()).split("\n\n")
            if line and line != ": ping"
        ]
    assert (
        len(events) == 1
        and json.loads(events[0].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    )
    refused = slow.client.post("/v1/completions", json={**body, "model": "none"})
    assert refused.status_code == 404 and error_of(refused)["code"] == "model_not_found"
    wait_until(lambda: slow.running() == 0, 20.0, "the worker is free again")


def test_row_14_a_stream_that_has_only_its_head_goes_on_when_its_processor_is_killed() -> None:
    common = ("--mesh", "frontend-head-only", "--interface", "127.0.0.1", "--no-mdns")

    def peer(role: str, *options: str) -> Process:
        return Process(meshserve_command("run", "--role", role, *common, *options))

    with ExitStack() as stack:
        front = stack.enter_context(peer("frontend,router", "--http", "127.0.0.1:0"))
        ready = front.ready()
        others = [("processor", "--name", "one"), ("processor", "--name", "two")]
        others.append(("decode", "--engine-opt", "prefill_tokens_per_s=15"))
        peers = [stack.enter_context(peer(*given, "--peer", ready["address"])) for given in others]
        for one in peers:
            one.ready()
        client = stack.enter_context(httpx.Client(base_url=ready["http"], timeout=60.0))

        def num_requests() -> dict[str, int]:
            found = client.get("/mesh/peers").json()
            return {one["name"]: one["held"].get("requests", 0) for one in found if one["held"]}

        wait_until(lambda: {"one", "two"} <= num_requests().keys(), 20.0, "all know each other")
        wait_until(lambda: client.get("/ready").status_code == 200, 20.0, "requests are served")
        body = {**PATHS["/v1/completions"], "prompt": "l" * 60}
        with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            held = num_requests()
            peers[0 if held["one"] else 1].kill()
            text = "".join(response.iter_text())
    assert text.endswith("data: [DONE]\n\n") and '"error":{' not in text, text
    assert text.count('"finish_reason":"length"') == 1


def test_whole_answers_get_no_pings(slow: Frontend) -> None:
    response = slow.client.post(
        "/v1/completions", json={**PATHS["/v1/completions"], "stream": False, "prompt": "g" * 40}
    )
    assert (
        response.status_code == 200
        and response.content.startswith(b'{"id"')
        and "transfer-encoding" not in response.headers
    )


@pytest.mark.parametrize(
    ("ping_s", "writes", "due"),
    [
        # (time of the look, writes so far, head sent), and at which looks something is due
        (5.0, [(0.0, 0, False), (0.5, 0, False), (3.5, 0, False), (4.0, 0, False)], [4.0]),
        (
            5.0,
            [(0.0, 1, True), (4.0, 1, True), (4.5, 2, True), (8.0, 2, True), (8.5, 2, True)],
            [4.0, 8.5],
        ),
        (1.0, [(0.0, 0, False), (0.5, 0, False), (1.0, 1, True), (1.5, 1, True)], [0.5, 1.5]),
        (
            20.0,
            [(0.0, 0, False), (4.0, 0, False), (4.5, 1, True), (20.0, 1, True), (23.5, 1, True)],
            [4.0, 23.5],
        ),
        (0.0, [(0.0, 0, False), (4.0, 0, False), (4.5, 1, True), (400.0, 1, True)], [4.0]),
    ],
)
def test_a_pause_is_found_before_it_is_too_long(
    ping_s: float, writes: list[tuple[float, int, bool]], due: list[float]
) -> None:
    pauses = Pauses(ping_s, 0.5)
    assert [
        now_s for now_s, num, has_head in writes if pauses.is_due(now_s, num, has_head=has_head)
    ] == due
    assert HEAD_BY_S == 5.0
