"""The processor refuses requests that a model cannot serve, and survives what other peers must not send."""

import json
from typing import Any

import pytest

from meshserve.errors import InvalidRequest, MeshserveError, UnknownField
from meshserve.wire.messages import COMPLETE, ROUTE
from tests.harness import run_async, until
from tests.roles.scripted import ASK, DEADLINE_S, TOOL, Client, another_worker, scene, texts, tokens


@pytest.mark.parametrize(
    ("fields", "missing", "param"),
    [
        ({"logprobs": 0}, "logprobs", "logprobs"),
        ({"presence_penalty": 1.0}, "penalties", "presence_penalty"),
        ({"frequency_penalty": -1.0}, "penalties", "frequency_penalty"),
        ({"logit_bias": ((1, 5.0),)}, "logit_bias", "logit_bias"),
        ({"json_schema": "{}"}, "json_schema", "response_format"),
        ({"tools": json.dumps([TOOL]), "tool_choice": "auto"}, "tools", "tools"),
        ({"tools": json.dumps([TOOL]), "tool_choice": "required"}, "json_schema", "tools"),
    ],
)
def test_what_the_models_engine_cannot_do_is_refused_by_the_fields_name(fields: dict[str, Any], missing: str, param: str) -> None:
    async def check() -> None:
        features = tuple({"logprobs", "penalties", "logit_bias", "json_schema", "tools"} - {missing})
        async with scene(features=features) as found:
            error = await found.ask(kind="chat", prompt=None, messages=ASK, **fields).failure()
            assert error.code == "unsupported" and isinstance(error, InvalidRequest) and error.param == param
            assert not found.worker.calls and found.processor.is_idle

    run_async(check())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": ("fine", "")}, "prompt"),
        ({"prompt": ("fine", "x" * 131_072)}, "prompt"),
        ({"prompt": tokens("ok") * 65_535, "max_tokens": 3}, "prompt"),
        ({"prompt": "x" * 10_000, "n": 128}, "n"),
        ({"prompt": "x" * 20_000, "echo": True, "logprobs": 0}, "echo"),
        ({"logit_bias": ((100_000, 5.0),)}, "logit_bias"),
    ],
)
def test_what_the_model_has_no_room_for_or_does_not_know_is_refused(fields: dict[str, Any], param: str) -> None:
    async def check() -> None:
        async with scene() as found:
            error = await found.ask(**fields).failure()
            assert isinstance(error, InvalidRequest) and error.param == param and found.processor.is_idle

    run_async(check())


@pytest.mark.parametrize(
    "item",
    [
        [1, 65],
        [[0, 65], [[-1.0, []], [-1.0, []]]],
        [[0, 65], [None]],
        [[0, 65], [[-1.0, "x"]]],
        ["prompt_logprobs", [None]],
        [],
        7,
        [0, 65],
    ],
)
def test_what_a_worker_must_not_say_fails_the_request_and_nothing_else(item: Any) -> None:
    async def check() -> None:
        async with scene() as found:
            client = found.ask(echo=True, logprobs=0)
            await found.worker.asked(1)
            found.worker.calls[0].send(item)
            assert (await client.failure()).code == "protocol_error"
            await until(lambda: found.worker.cancelled == ["r"], DEADLINE_S, "the worker is told")
            assert found.processor.is_idle

    run_async(check())


def test_a_request_that_is_too_new_for_a_worker_goes_to_another_one_or_fails_with_the_reason() -> None:
    async def check() -> None:
        async with scene() as found:
            found.worker.error = UnknownField("a peer of an older version does not know top_x")
            error = await found.ask().failure()
            assert isinstance(error, UnknownField) and "top_x" in error.message
            async with another_worker(found) as newer:
                newer.script = ("yes",)
                clients = [found.ask(request_id=f"r{number}", wants_receipt=True) for number in range(2)]  # one for each, in turn
                receipts = [(await client.end()).receipt or {} for client in clients]
            assert ["".join(client.raw) for client in clients] == ["yes", "yes"]
            attempts = [[attempt["outcome"] for attempt in receipt["attempts"]] for receipt in receipts]
            assert sorted(attempts) == [[], ["unknown_field"]]

    run_async(check())


@pytest.mark.parametrize(
    "account",
    [
        {},
        [],
        ["x", 1.0],
        [0.0, 0.0, 0.0, "x", 0.0, 0, None],
        [0.0, 0.0, 0.0, float("nan"), [1], "x", 5],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0, [5, 5, float("inf"), None]],
    ],
)
def test_a_workers_malformed_account_costs_the_receipt_its_figures_and_nothing_else(account: Any) -> None:
    async def check() -> None:
        async with scene() as found:
            client = found.ask(wants_receipt=True)
            await found.worker.asked(1)
            found.worker.calls[0].send([account, 0, *b"ab"] if isinstance(account, list) else [0, *b"ab"])
            found.worker.calls[0].end({"reason": "stop", "account": account})
            ending = await client.end()
            assert texts(client, 0) == "ab" and ending.receipt is not None
            assert ending.receipt["phases_ms"]["decode"] == 0 and ending.receipt["attempts"] == []
            assert found.processor.is_idle

    run_async(check())


@pytest.mark.parametrize(
    "answer", [None, {}, [], {"router": "r", "policy": "kv", "decode": [], "prefill": []}, {"decode": 1, "prefill": [[]]}]
)
def test_a_router_whose_answer_names_no_worker_is_passed_over(answer: Any) -> None:
    async def check() -> None:
        async with scene(roles=("processor", "decode", "router")) as found:
            found.mesh.serve(ROUTE, lambda call: call.end(answer))
            client = found.ask(wants_receipt=True)
            await found.worker.asked(1)
            found.worker.say(0, "x")
            ending = await client.end()
            assert ending.receipt is not None and ending.receipt["peers"]["router"] is None

    run_async(check())


def test_a_schema_that_the_engine_cannot_keep_to_is_named_as_the_client_knows_it() -> None:
    async def check() -> None:
        async with scene() as found:
            for fields, param in (
                ({"json_schema": "{}"}, "response_format"),
                ({"tools": json.dumps([TOOL]), "tool_choice": "auto"}, "tools"),
            ):
                client = found.ask(kind="chat", prompt=None, messages=ASK, **fields)
                await until(lambda: bool(found.worker.calls), DEADLINE_S, "the worker is asked")
                found.worker.calls.pop().fail(InvalidRequest("no such keyword", param="json_schema"))
                error = await client.failure()
                assert isinstance(error, InvalidRequest) and error.param == param

    run_async(check())


@pytest.mark.parametrize("body", [None, {}, {"kind": "chat"}, {"kind": "chat", "request_id": "r", "model": "dummy", "messages": [7]}])
def test_a_frontend_that_does_not_keep_to_the_protocol_is_refused(body: Any) -> None:
    async def check() -> MeshserveError:
        async with scene() as found:
            client = Client()
            found.mesh.open(found.mesh.incarnation, COMPLETE, body, client, 5.0)
            return await client.failure()

    assert run_async(check()).code == "protocol_error"
