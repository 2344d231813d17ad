"""Cases for keys, sizes, a mesh that is full, deadlines, and clients that leave: as those of :mod:`tests.api.cases`."""

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

import anthropic
import openai
import pytest

from tests.api import completion_cases  # noqa: F401  # the import registers its cases
from tests.api.cases import CASES, GO_ON, SCHEMA, USER, case, chat, completion
from tests.api.clients import KEYS, TIMEOUT_S, Clients, gather, plain, refusal
from tests.api.other_cases import message, respond
from tests.harness import wait_until
from tests.harness.engines import HOLD_MARK
from tests.harness.held import held

FREE_S = 5.0
NUM_PLACES = 8


# --- more ways of asking


@case
def an_echos_logprobs(clients: Clients) -> Any:
    found = completion(clients, echo=True, logprobs=1, max_tokens=2).choices[0].logprobs
    assert len(found.tokens) == 16 + 2 and found.token_logprobs[0] is None and all(value <= 0 for value in found.token_logprobs[1:])
    return plain(found)


@case
def a_schema_is_kept_to_in_a_stream(clients: Clients) -> Any:
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
    made = gather(chat(clients, response_format=wanted, max_tokens=300, extra_body={}, stream=True))
    assert type(json.loads(made.texts[0])["answer"]) is int and made.reasons == {0: "stop"}
    return made.outcome()


@case
def a_schema_that_no_document_can_be_written_under_is_refused(clients: Clients) -> Any:
    properties = {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}
    schema = {"type": "object", "properties": properties, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    found = refusal(lambda: chat(clients, response_format=wanted))
    assert (found["status"], found["param"]) == (400, "response_format")
    return found


@case
def a_raw_response_is_read_as_it_comes(clients: Clients) -> Any:
    asked: Any = {"model": "dummy", "messages": USER, "max_tokens": 6, "stream": True, "extra_body": GO_ON}
    with clients.openai.chat.completions.with_streaming_response.create(**asked) as raw:
        lines = [line for line in raw.iter_lines() if line]
        assert raw.headers["content-type"].startswith("text/event-stream") and raw.headers["x-request-id"]
    assert lines[-1] == "data: [DONE]"
    return [plain(json.loads(line.removeprefix("data: "))) for line in lines[:-1]]


@case
def anthropics_asynchronous_client(clients: Clients) -> Any:
    async def ask() -> Any:
        async with anthropic.AsyncAnthropic(base_url=clients.url, api_key=KEYS[0], timeout=TIMEOUT_S, max_retries=0) as client:
            whole = await client.messages.create(model="dummy", messages=USER, max_tokens=6, extra_body=GO_ON)
            async with client.messages.stream(model="dummy", messages=USER, max_tokens=6, extra_body=GO_ON) as stream:
                text = "".join([piece async for piece in stream.text_stream])
            return whole, text

    whole, text = asyncio.run(ask())
    assert whole.content[0].text == text
    return [plain(whole), text]


# --- keys, sizes, deadlines


@case
def a_wrong_key_is_refused(clients: Clients) -> Any:
    stranger, other = clients.openai.with_options(api_key="wrong"), clients.anthropic.with_options(api_key="wrong")
    found = [
        refusal(lambda: stranger.chat.completions.create(model="dummy", messages=USER)),
        refusal(lambda: list(stranger.responses.create(model="dummy", input="Hello", stream=True))),
        refusal(stranger.models.list),
        refusal(lambda: other.messages.create(model="dummy", messages=USER, max_tokens=6)),
    ]
    assert {told["status"] for told in found} == {401}
    return found


@case
def a_body_that_is_too_long_is_refused(clients: Clients) -> Any:
    long = "x" * 2_200_000
    found = [refusal(lambda: completion(clients, prompt=long)), refusal(lambda: respond(clients, input=long))]
    found.append(refusal(lambda: message(clients, messages=[{"role": "user", "content": long}])))
    assert {told["status"] for told in found} == {413}
    return found


@case
def a_deadline_of_the_clients_is_kept(clients: Clients) -> Any:
    late = {"extra_headers": {"x-request-timeout": "0.2"}}
    found = [
        refusal(lambda: completion(clients, prompt=HOLD_MARK, **late)),
        refusal(lambda: message(clients, messages=[{"role": "user", "content": HOLD_MARK}], **late)),
    ]
    assert {told["status"] for told in found} == {504}
    return [{key: part for key, part in told.items() if key != "message"} for told in found]  # it names the peer


# --- clients that leave


def wait_until_free(clients: Clients) -> None:
    """Nothing is held anywhere, on any peer."""

    def left() -> dict[str, int]:
        return held(clients.http.get("/mesh/peers").json())

    try:
        wait_until(lambda: not left(), FREE_S, "nothing is held")
    except AssertionError as error:
        raise AssertionError(f"still held: {left()}") from error


@case
def a_stream_that_is_closed_frees_everything(clients: Clients) -> Any:
    for ask in (chat, completion, respond):
        limit = {"max_output_tokens" if ask is respond else "max_tokens": 50_000}
        with ask(clients, stream=True, **limit) as stream:
            for _, _ in zip(range(3), stream, strict=False):
                pass
    with message(clients, stream=True, max_tokens=50_000) as stream:
        next(iter(stream))
    wait_until_free(clients)
    return plain(chat(clients))


@case
def a_stream_that_is_ended_by_name_ends_in_an_error(clients: Clients) -> Any:
    with chat(clients, stream=True, max_tokens=50_000, extra_headers={"x-request-id": "to-be-ended"}) as stream:
        chunks = iter(stream)
        next(chunks)
        assert clients.http.delete("/mesh/requests/to-be-ended").status_code == 200
        with pytest.raises(openai.APIError) as caught:
            for _ in chunks:
                pass
    wait_until_free(clients)
    return [caught.value.code, caught.value.message]


# --- a mesh that is full


def ask_and_hold(clients: Clients, key: str, num_answers: int) -> socket.socket:
    """A request that gets no answer until its client leaves."""
    body = json.dumps({"model": "dummy", "prompt": HOLD_MARK, "max_tokens": 6, "n": num_answers}).encode()
    parts = urlsplit(clients.url)
    assert parts.hostname is not None and parts.port is not None
    connection = socket.create_connection((parts.hostname, parts.port), TIMEOUT_S)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def level(clients: Clients, name: str) -> int:
    """So many of this are held, on all peers."""
    return sum(int(peer["held"].get(name, 0)) for peer in clients.http.get("/mesh/peers").json())


@contextmanager
def full(clients: Clients, *waiting: str) -> Iterator[None]:
    """The first key has all places, and these keys wait; all of them leave in the end."""
    with ExitStack() as stack:
        stack.enter_context(closing(ask_and_hold(clients, KEYS[0], NUM_PLACES)))
        wait_until(lambda: level(clients, "admission_slots") == NUM_PLACES, FREE_S, "all places are taken")
        for number, key in enumerate(waiting, 1):
            stack.enter_context(closing(ask_and_hold(clients, key, 1)))
            wait_until(lambda number=number: level(clients, "waiting_for_admission") == number, FREE_S, "it waits")  # type: ignore[misc]
        yield
    wait_until_free(clients)


def refused_for_now(clients: Clients, status: int, *waiting: str) -> Any:
    """What the two clients are told when the mesh is full, and when to come back."""
    with full(clients, *waiting):
        found = [refusal(lambda: chat(clients)), refusal(lambda: list(chat(clients, stream=True))), refusal(lambda: message(clients))]
        with pytest.raises(openai.APIStatusError) as caught:
            chat(clients)
    assert {told["status"] for told in found} == {status} and 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    return found


def num_refused(clients: Clients) -> int:
    """Requests that found no place, so far."""
    return sum(peer["counters"].get("requests_refused", 0) for peer in clients.http.get("/mesh/peers").json())


def tried_again(clients: Clients, ask: Callable[[], Any], *waiting: str) -> Any:
    """What a client gets that came when the mesh was full, was refused, and came again when it was not."""
    before = num_refused(clients)
    with ThreadPoolExecutor(1) as pool:
        with full(clients, *waiting):
            running = pool.submit(ask)
            wait_until(lambda: num_refused(clients) > before, FREE_S, "it was refused")
        return plain(running.result())


@case
def a_full_mesh_says_when_to_come_back(clients: Clients) -> Any:
    return refused_for_now(clients, 503, KEYS[0], KEYS[0])


@case
def a_client_with_more_than_its_share_is_told_so(clients: Clients) -> Any:
    return refused_for_now(clients, 429, KEYS[0], KEYS[1])


@case
def the_client_tries_again_after_503(clients: Clients) -> Any:
    patient = clients.openai.with_options(max_retries=3)
    return tried_again(
        clients, lambda: patient.chat.completions.create(model="dummy", messages=USER, max_tokens=6, extra_body=GO_ON), KEYS[0], KEYS[0]
    )


@case
def anthropics_client_tries_again_after_429(clients: Clients) -> Any:
    patient = clients.anthropic.with_options(max_retries=3)
    return tried_again(
        clients, lambda: patient.messages.create(model="dummy", messages=USER, max_tokens=6, extra_body=GO_ON), KEYS[0], KEYS[1]
    )


def parameters() -> list[Any]:
    """The table, for pytest."""
    return [pytest.param(found, id=found.__name__) for found in CASES]
