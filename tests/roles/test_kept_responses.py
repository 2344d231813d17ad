"""Responses that are kept: what the official client does with them, and what a processor keeps."""

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import httpx
import openai
import pytest

from meshserve.mesh.keys import MeshKey, owner_secret
from meshserve.roles.frontend.access import owner_of
from meshserve.roles.frontend.kept_items import input_items, name_in
from meshserve.roles.frontend.kept_responses import first_found, gathered
from meshserve.roles.processor.kept_responses import ResponseStore
from meshserve.wire.completion import Ending, EndItem, TextItem
from meshserve.wire.kept import KeptResponse, joined
from tests.harness import ALL_ROLES, Process, meshserve_command, wait_until
from tests.roles.frontends import Frontend, started

OTHER_FRONTEND = ("run", "--role", "frontend", "--interface", "127.0.0.1", "--no-mdns", "--http", "127.0.0.1:0")

FUNCTION: Any = {"type": "function", "strict": True, "name": "get_time", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def frontend() -> Iterator[Frontend]:
    yield from started()


@pytest.fixture
def client(frontend: Frontend) -> Iterator[openai.OpenAI]:
    with connected(frontend.url, "none") as client:
        yield client


def connected(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def respond(client: openai.OpenAI, **fields: Any) -> Any:
    asked = {"model": "dummy", "input": "Tell me about the harbor", "max_output_tokens": 6, **fields}
    return client.responses.create(**asked, extra_body={"ignore_eos": True})


def said(reply: Any) -> tuple[str, int]:
    """To what, too; how much of that was cached differs."""
    return reply.output_text, reply.usage.total_tokens


# --- as the client sees it


def test_a_response_is_given_again_as_it_was(client: openai.OpenAI) -> None:
    reply = respond(client, metadata={"for": "harbors"}, instructions="Be brief", temperature=0.5)
    assert client.responses.retrieve(reply.id) == reply and reply.store is True


def test_a_streamed_response_is_kept_as_its_last_event_has_it(client: openai.OpenAI) -> None:
    events = list(respond(client, stream=True))
    assert client.responses.retrieve(events[-1].response.id) == events[-1].response


def test_a_response_with_logprobs_is_given_again_as_it_was(client: openai.OpenAI) -> None:
    reply = respond(client, include=["message.output_text.logprobs"], top_logprobs=2)
    assert client.responses.retrieve(reply.id) == reply


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_request_goes_on_from_a_response_as_from_all_its_messages(client: openai.OpenAI, is_stream: bool) -> None:
    first = respond(client)
    asked = respond(client, input="And the sea?", previous_response_id=first.id, stream=is_stream)
    second = list(asked)[-1].response if is_stream else asked
    third = respond(client, input="And the sky?", previous_response_id=second.id)
    spoken = [(None, "Tell me about the harbor"), (first, "And the sea?"), (second, "And the sky?")]
    items: list[Any] = []
    for reply, text in spoken:
        items += [*(reply.output if reply is not None else ()), {"role": "user", "content": text}]
    whole = respond(client, input=items)
    assert said(third) == said(whole)
    assert third.previous_response_id == second.id and second.previous_response_id == first.id


def test_instructions_are_for_one_response_only(client: openai.OpenAI) -> None:
    first = respond(client, instructions="Be brief")
    second = respond(client, input="And the sea?", previous_response_id=first.id)
    question, other = ({"role": "user", "content": text} for text in ("Tell me about the harbor", "And the sea?"))
    plain = respond(client, input=[question, *first.output, other])
    assert said(second) == said(plain)
    again = respond(client, input="And the sea?", previous_response_id=first.id, instructions="Be brief")
    assert again.usage.input_tokens > second.usage.input_tokens


def test_a_call_is_answered_by_its_id_alone(client: openai.OpenAI) -> None:
    asked = respond(client, tools=[FUNCTION], tool_choice="required", max_output_tokens=300)
    (call,) = asked.output
    answer = {"type": "function_call_output", "call_id": call.call_id, "output": "Noon"}
    reply = respond(client, input=[answer], previous_response_id=asked.id, tools=[FUNCTION])
    told = client.responses.input_items.list(reply.id, order="asc").data
    assert [item.type for item in told] == ["message", "function_call", "function_call_output"]
    with pytest.raises(openai.BadRequestError, match=call.call_id):
        respond(client, input="Noon", previous_response_id=asked.id)


def test_items_are_referred_to_by_their_ids(client: openai.OpenAI) -> None:
    first = respond(client)
    question = client.responses.input_items.list(first.id).data[0]
    references: list[Any] = [{"type": "item_reference", "id": item_id} for item_id in (question.id, first.output[0].id)]
    reply = respond(client, input=[*references, {"role": "user", "content": "And the sea?"}], store=False)
    whole = respond(client, input="And the sea?", previous_response_id=first.id)
    assert said(reply) == said(whole)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metadata", '{"a": 1e999}'),
        ("tools", '[{"type": "function", "name": "f", "more": 1e999}]'),
        ("text", '{"format": {"type": "text", "more": -1e999}}'),
    ],
)
@pytest.mark.parametrize("store", ["true", "false"])
def test_what_no_answer_could_repeat_is_refused_by_its_name(frontend: Frontend, field: str, value: str, store: str) -> None:
    body = f'{{"model": "dummy", "input": "x", "store": {store}, "{field}": {value}}}'
    response = httpx.post(f"{frontend.url}/v1/responses", content=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == field


def test_nobody_waits_for_a_processor_that_is_silent() -> None:
    async def answer(found: str | None) -> str | None:
        return found

    async def find() -> tuple[str | None, bool]:
        silent = asyncio.get_running_loop().create_future()

        async def wait() -> str | None:
            await silent
            return None

        found = await first_found([wait(), answer(None), answer("kept"), answer(None)])
        await asyncio.sleep(0)
        return found, silent.cancelled()

    assert asyncio.run(find()) == ("kept", True)
    assert asyncio.run(first_found([answer(None), answer(None)])) is None


def test_many_references_to_one_response_read_it_once() -> None:
    messages = [{"role": "user", "content": "a"}] * 200
    kept = KeptResponse("e1", "dummy", 0, "{}", messages, [], Ending("stop", 1, 1, 0))
    ids = [item["id"] for item in input_items(kept)]
    assert list(gathered(None, dict.fromkeys(ids, "e1"), {"e1": kept}).items) == ids
    few, many = (_calls_of(partial(gathered, None, dict.fromkeys(names, "e1"), {"e1": kept})) for names in (ids[:1], ids))
    assert many < 2 * few


def _calls_of(work: Callable[[], object]) -> int:
    """How many functions of Python's are called."""
    found: list[str] = []
    sys.setprofile(lambda frame, event, argument: found.append(event) if event == "call" else None)
    try:
        work()
    finally:
        sys.setprofile(None)
    return len(found)


def test_the_input_is_listed_in_pages_in_either_order(client: openai.OpenAI) -> None:
    texts = ["one", "two", "three"]
    reply = respond(client, input=[{"role": "user", "content": text} for text in texts])
    for order, expected in (("asc", texts), ("desc", texts[::-1])):
        listed = list(client.responses.input_items.list(reply.id, limit=2, order=order))  # type: ignore[arg-type]
        assert [item.content[0].text for item in listed] == expected  # type: ignore[union-attr, index]
    page = client.responses.input_items.list(reply.id, limit=2)
    assert page.has_more and len(page.data) == 2


def test_what_was_deleted_is_not_found_and_what_went_on_from_it_still_is(client: openai.OpenAI) -> None:
    first = respond(client)
    second = respond(client, input="And the sea?", previous_response_id=first.id)
    client.responses.delete(first.id)
    assert client.responses.retrieve(second.id) == second
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError) as refused:
            ask(first.id)
        assert refused.value.code == "response_not_found"


def test_nothing_is_kept_where_the_client_says_so(client: openai.OpenAI) -> None:
    reply = respond(client, store=False)
    assert reply.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(reply.id)


def test_the_input_is_counted_as_a_response_has_it(client: openai.OpenAI) -> None:
    first = respond(client)
    second = respond(client, input="And the sea?", previous_response_id=first.id, instructions="Be brief")
    asked: Any = {"model": "dummy", "input": "And the sea?", "previous_response_id": first.id, "instructions": "Be brief"}
    counted = client.responses.input_tokens.count(**asked)
    assert counted.input_tokens == second.usage.input_tokens and counted.object == "response.input_tokens"


@pytest.mark.parametrize("response_id", ["resp_0", "resp_" + "f" * 40, "chatcmpl-1", "x" * 500, "resp_"])
def test_an_unknown_response_is_the_404_that_clients_know(client: openai.OpenAI, response_id: str) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.responses.retrieve(response_id)
    assert refused.value.code == "response_not_found"
    with pytest.raises(openai.NotFoundError) as refused:
        respond(client, previous_response_id=response_id)
    assert refused.value.code == "previous_response_not_found" and refused.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError) as refused:
        respond(client, input=[{"type": "item_reference", "id": response_id}])
    assert refused.value.code == "response_not_found" and refused.value.param == "input[0]"


# --- whose it is, and where


def test_a_response_is_found_by_its_owner_alone_from_any_frontend() -> None:
    keys = ("--api-key", "one", "--api-key", "two")
    with Process(meshserve_command(*ALL_ROLES, *keys)) as first:
        ready = first.ready()
        address = ready["address"].removeprefix("tcp://")
        with Process(meshserve_command(*OTHER_FRONTEND, *keys, "--peer", address)) as second:
            urls = [ready["http"], second.ready()["http"]]
            wait_until(lambda: all(httpx.get(f"{url}/ready").is_success for url in urls), 20.0, "both frontends are ready")
            with ExitStack() as stack:
                mine, elsewhere = (stack.enter_context(connected(url, "one")) for url in urls)
                others = [stack.enter_context(connected(url, "two")) for url in urls]
                reply = respond(elsewhere)
                assert mine.responses.retrieve(reply.id) == elsewhere.responses.retrieve(reply.id) == reply
                assert respond(mine, input="And the sea?", previous_response_id=reply.id).output_text
                for other in others:
                    for ask in (other.responses.retrieve, other.responses.delete, other.responses.input_items.list):
                        with pytest.raises(openai.NotFoundError):
                            ask(reply.id)
                    with pytest.raises(openai.NotFoundError):
                        respond(other, previous_response_id=reply.id)
                    with pytest.raises(openai.NotFoundError):
                        respond(other, input=[{"type": "item_reference", "id": reply.output[0].id}])
                mine.responses.delete(reply.id)
                with pytest.raises(openai.NotFoundError):
                    elsewhere.responses.retrieve(reply.id)


def test_an_owner_is_the_same_in_all_frontends_of_a_mesh_and_in_no_other() -> None:
    key = MeshKey(bytes(32))
    secrets = [owner_secret(key, "default"), owner_secret(MeshKey(bytes(31) + b"1"), "default")]
    secrets += [owner_secret(None, "default"), owner_secret(None, "other")]
    owners = {owner_of(secret, api_key) for secret in secrets for api_key in ("one", "two")}
    assert len(owners) == 8 and {len(owner) for owner in owners} == {16}
    assert owner_of(owner_secret(key, "whatever"), "one") in owners, "a key file alone says which mesh it is"


# --- what a processor keeps


def test_the_store_gives_nothing_to_others_than_the_owner() -> None:
    store = ResponseStore(2, 10_000)
    store.keep("a", b"1", b"me")
    assert store.find("a", b"you") is store.find("a") is None and not store.forget("a", b"you")
    assert store.find("a", b"me") == b"1" and store.forget("a", b"me")


def test_the_store_forgets_what_was_asked_for_longest_ago() -> None:
    store = ResponseStore(2, 10_000)
    store.keep("a", b"1")
    store.keep("b", b"2")
    assert store.find("a") == b"1"
    store.keep("c", b"3")
    assert (store.find("a"), store.find("b"), store.find("c")) == (b"1", None, b"3")


def test_the_store_is_bounded_by_bytes() -> None:
    store = ResponseStore(100, 10_000)
    for number in range(50):
        store.keep(str(number), bytes(1000))
        assert store.size_bytes <= 10_000
    assert store.find("49") is not None and store.find("0") is None
    store.keep("longer than all", bytes(10_000))
    assert store.find("longer than all") is None and store.find("49") is not None


def test_what_is_forgotten_takes_no_room() -> None:
    store = ResponseStore(100, 10_000)
    store.keep("a", bytes(1000))
    store.keep("a", bytes(10))
    assert store.forget("a") and not store.forget("a")
    assert len(store) == store.size_bytes == 0


def test_texts_are_joined_and_nothing_else_is() -> None:
    scored, end = TextItem(0, "x", [(b"x", -1.0, [])], [0]), EndItem(0, "stop")
    assert joined(["a", "b"]) == ["ab"]
    assert joined([TextItem(0, "a"), TextItem(0, "b"), TextItem(1, "c"), scored, scored, TextItem(0, "d"), end]) == [
        *(TextItem(0, "ab"), TextItem(1, "c"), scored, scored, TextItem(0, "d"), end)
    ]


@pytest.mark.parametrize(
    ("item_id", "name"),
    [
        ("msg_8e7a0123456789ab1200", "8e7a0123456789ab12"),
        ("fc_8e7a0123456789ab1200n3", "8e7a0123456789ab12"),
        ("fco_8e7a0123456789ab12i17", "8e7a0123456789ab12"),
        ("msg_", None),
        ("item_reference", None),
    ],
)
def test_an_items_id_tells_its_response(item_id: str, name: str | None) -> None:
    assert name_in(item_id) == name
