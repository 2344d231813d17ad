"""Workers whose KV caches differ in size: what fits the largest is served there, and what fits none
is told in words that programs read.
"""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.harness import Process, meshserve_command, wait_until
from tests.roles.frontends import error_of

SMALL, LARGE = 256, 1024
POLICIES = ("kv", "round-robin", "random", "least-loaded", "power-of-two")
LOCAL = ("--interface", "127.0.0.1", "--no-mdns")


def unequal(mesh: str, roles: str) -> Iterator[httpx.Client]:
    """A frontend with a small worker, and a large worker beside it."""
    common = ("--mesh", mesh, *LOCAL)
    small = meshserve_command(
        "run",
        "--role",
        roles,
        *common,
        "--http",
        "127.0.0.1:0",
        "--kv-cache-tokens",
        str(SMALL),
        "--name",
        "small",
    )
    with Process(small) as front:
        ready = front.ready()
        peer = ("--peer", ready["address"], "--kv-cache-tokens", str(LARGE), "--name", "large")
        with Process(meshserve_command("run", "--role", "decode", *common, *peer)) as worker:
            worker.ready()
            with httpx.Client(base_url=ready["http"], timeout=60.0) as client:
                wait_until(lambda: longest(client) == LARGE, 20.0, "the large worker is known")
                yield client


def longest(client: httpx.Client) -> int:
    return int(client.get("/v1/models/dummy").json()["max_model_len"])


@pytest.fixture(scope="module")
def routed() -> Iterator[httpx.Client]:
    yield from unequal("too-long-routed", "frontend,processor,router,decode")


@pytest.fixture(scope="module")
def unrouted() -> Iterator[httpx.Client]:
    yield from unequal("too-long-unrouted", "frontend,processor,decode")


def served_by(client: httpx.Client, prompt: str, max_tokens: int, **wanted: str) -> set[str]:
    body = {
        "model": "dummy",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "meshserve": {"receipt": True, **wanted},
    }
    answers = [client.post("/v1/completions", json=body) for _ in range(6)]
    assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
    receipts = [answer.json()["meshserve"] for answer in answers]
    assert all(len(receipt["attempts"]) <= 1 for receipt in receipts), "nobody was asked in vain"
    return {receipt["peers"]["decode"] for receipt in receipts}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(300, 10), (10, 300)])
def test_every_policy_passes_over_a_worker_that_is_too_small(
    routed: httpx.Client, policy: str, num_prompt: int, max_tokens: int
) -> None:
    assert served_by(routed, "x" * num_prompt, max_tokens, policy=policy) == {"large"}


def test_so_does_a_processor_without_a_router(unrouted: httpx.Client) -> None:
    assert served_by(unrouted, "x" * 300, 10) == {"large"}
    assert served_by(unrouted, "x" * 10, 10) == {"small", "large"}


TOO_LONG = rf"maximum context length is {LARGE} tokens\. However,"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (
            "/v1/completions",
            {"prompt": "x" * 1100},
            rf"{TOO_LONG} your prompt resulted in 1100 tokens",
        ),
        (
            "/v1/completions",
            {"prompt": "x" * 100, "max_tokens": 1000},
            rf"{TOO_LONG} you requested 1100 tokens \(100 in the prompt,",
        ),
        (
            "/v1/chat/completions",
            {"messages": "x" * 1100},
            rf"{TOO_LONG} your messages resulted in 11\d\d tokens",
        ),
        ("/v1/responses", {"input": "x" * 1100}, rf"{TOO_LONG} your \w+ resulted in 11\d\d tokens"),
        (
            "/v1/messages",
            {"messages": "x" * 1100, "max_tokens": 9},
            rf"^prompt is too long: 11\d\d tokens > {LARGE} maximum$",
        ),
        (
            "/v1/messages",
            {"messages": "x" * 100, "max_tokens": 1000},
            rf"^input length and `max_tokens` exceed context limit: 1\d\d \+ 1000 > {LARGE}, ",
        ),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_what_fits_nowhere_is_told_in_the_words_that_clients_look_for(
    routed: httpx.Client, path: str, body: dict[str, Any], words: str, is_stream: bool
) -> None:
    if "messages" in body:
        body = {**body, "messages": [{"role": "user", "content": body["messages"]}]}
    response = routed.post(path, json={"model": "dummy", "stream": is_stream, **body})
    assert response.status_code == 400 and "retry-after" not in response.headers
    error = response.json()["error"] if path == "/v1/messages" else error_of(response)
    assert error["code"] == "context_length_exceeded" and error["type"] == "invalid_request_error"
    assert re.search(words, error["message"]), error["message"]


def test_a_worker_whose_options_contradict_each_other_says_so_at_its_start() -> None:
    options = ("--kv-cache-tokens", "160", "--engine-opt", "context_length=1000")
    with Process(
        meshserve_command("run", "--role", "decode", *LOCAL, "--mesh", "too-long-said", *options)
    ) as worker:
        worker.ready()
        wait_until(
            lambda: "sequences end at 160 of 1,000 tokens" in worker.stderr_text,
            10.0,
            "it says what does not go together",
        )
