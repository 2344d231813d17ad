"""The HTTP side of one peer that holds all roles, over a real socket."""

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.harness import ALL_ROLES, Process, meshserve_command


@pytest.fixture(scope="module")
def peer() -> Iterator[Process]:
    with Process(meshserve_command(*ALL_ROLES, "--mesh", "http-test")) as started:
        started.ready()
        yield started
        started.terminate()
        assert started.wait() == 0


@pytest.fixture
def client(peer: Process) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=peer.ready()["http"], timeout=60.0) as made:
        yield made


def test_completions_and_chats_streamed_and_not_say_the_same(client: httpx.Client) -> None:
    for path, fields in (
        ("/v1/completions", {"prompt": "Once upon a time"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Tell me"}]}]}),
    ):
        body = {"model": "dummy", "max_tokens": 12, "ignore_eos": True, **fields}
        whole = client.post(path, json=body).json()
        choice = whole["choices"][0]
        text = choice.get("text") or choice["message"]["content"]
        assert choice["finish_reason"] == "length" and whole["usage"]["completion_tokens"] == 12
        streamed = client.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
        events = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
        pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        assert "".join(piece.get("text") or piece.get("delta", {}).get("content") or "" for piece in pieces) == text
        assert pieces[-1]["finish_reason"] == "length"
        assert chunks[-1]["usage"]["completion_tokens"] == 12 and chunks[-1]["choices"] == []


def test_a_stop_string_ends_the_text_before_it(client: httpx.Client) -> None:
    body = {"model": "dummy", "prompt": "Stop me", "max_tokens": 40, "ignore_eos": True}
    full = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    stop = full[30:37]
    cut = client.post("/v1/completions", json={**body, "stop": [stop, "never said"]}).json()["choices"][0]
    assert cut["text"] == full[: full.index(stop)] and cut["finish_reason"] == "stop"


def test_generate_streams_lines_under_the_clients_own_label(client: httpx.Client) -> None:
    response = client.post("/generate", json={"prompt": "hello", "request_id": "mine"})
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert {line["request_id"] for line in lines} == {"mine"}
    assert lines[-1]["finish_reason"] in ("stop", "length") and all("text" in line for line in lines[:-1])


def test_every_response_carries_a_request_id_and_keeps_the_clients(client: httpx.Client) -> None:
    body = {"model": "dummy", "prompt": "hello", "max_tokens": 1, "meshserve": {"receipt": True}}
    assert client.post("/v1/completions", json=body).headers["x-request-id"]
    labelled = client.post("/v1/completions", json=body, headers={"x-request-id": "label-7"})
    assert labelled.headers["x-request-id"] == "label-7"
    receipt = labelled.json()["meshserve"]
    assert receipt["client_id"] == "label-7" and receipt["request_id"] != "label-7"


@pytest.mark.parametrize(
    ("path", "content", "status", "param", "words"),
    [
        ("/v1/completions", b"{not json", 400, None, "not JSON"),
        ("/v1/completions", b"[1]", 400, None, "JSON object"),
        ("/v1/completions", b'{"model": "dummy"}', 400, "prompt", "prompt is missing"),
        ("/v1/completions", b'{"prompt": "hi"}', 400, "model", "model is missing"),
        ("/v1/completions", b'{"model": "dummy", "prompt": "hi", "max_tokens": -1}', 400, "max_tokens", "between 1"),
        ("/v1/completions", b'{"model": "dummy", "prompt": "hi", "max_tokens": 1000000}', 400, "prompt", "context"),
        ("/v1/completions", b'{"model": "dummy", "prompt": "hi", "n": 129}', 400, "n", "between 1 and 128"),
        ("/v1/completions", b'{"model": "gpt-9", "prompt": "hi"}', 404, "model", "there are: dummy"),
        ("/v1/completions", b'{"model": "dummy", "prompt": "hi", "meshserve": {"policy": "best"}}', 400, "meshserve.policy", "kv"),
        ("/v1/completions", b'{"model": "dummy", "prompt": [300]}', 200, None, ""),
        ("/v1/chat/completions", b'{"model": "dummy"}', 400, "messages", "messages is missing"),
        ("/v1/chat/completions", b"[" * 100_000, 400, None, "nested"),
        ("/nowhere", b"{}", 404, None, "/nowhere"),
    ],
)
def test_a_bad_request_gets_an_error_in_openais_shape(
    client: httpx.Client, path: str, content: bytes, status: int, param: str | None, words: str
) -> None:
    response = client.post(path, content=content)
    assert response.status_code == status, response.text
    if status != 200:
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error" and error["param"] == param and words in error["message"]
    assert client.post("/v1/completions", json={"model": "dummy", "prompt": "still there?"}).status_code == 200


def test_a_prompt_over_the_context_length_is_refused(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"model": "dummy", "prompt": "x" * 140_000})
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"


def test_a_model_answers_to_each_name_it_is_served_under_and_to_no_other() -> None:
    with Process(meshserve_command(*ALL_ROLES, "--mesh", "http-names", "--served-model-name", "org/chat, small")) as peer:
        url = peer.ready()["http"]
        with httpx.Client(base_url=url, timeout=60.0) as client:
            assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["org/chat", "small"]
            for name in ("org/chat", "small"):
                assert client.get(f"/v1/models/{name}").json()["id"] == name
                answer = client.post("/v1/completions", json={"model": name, "prompt": "hi", "max_tokens": 1})
                assert answer.status_code == 200 and answer.json()["model"] == name
            refused = client.post("/v1/completions", json={"model": "dummy", "prompt": "hi"})
            assert refused.status_code == 404 and "there are: org/chat, small" in refused.json()["error"]["message"]
        peer.terminate()
        assert peer.wait() == 0


def test_an_api_key_guards_all_routes_but_health_and_ready() -> None:
    with Process(meshserve_command(*ALL_ROLES, "--mesh", "http-keys", "--api-key", "secret")) as peer:
        url = peer.ready()["http"]
        with httpx.Client(base_url=url, timeout=60.0) as client:
            assert client.get("/health").status_code == client.get("/ready").status_code == 200
            for headers in ({}, {"authorization": "Bearer wrong"}):
                refused = client.get("/v1/models", headers=headers)
                assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
            assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        peer.terminate()
        assert peer.wait() == 0
