"""Sequences that lose their worker after every single token, with workers that are played by hand: a client notices nothing."""

import json
from typing import Any

import pytest

from meshserve.errors import PeerLost
from meshserve.wire.generation import WorkerAccount
from tests.harness import run_async, until
from tests.roles.scripted import DEADLINE_S, Client, Scene, another_worker, scene

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
CHAT = {"kind": "chat", "prompt": None, "messages": [{"role": "user", "content": "hi"}], "tools": json.dumps([TOOL])}
CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'


async def play(found: Scene, client: Client, text: str, lifespan: int) -> None:
    """Say the text to whoever asks for it, from where the request stands, and die after so many tokens."""
    whole, calls, num_played = list(text.encode()), found.worker.calls, 0

    def goes_on() -> bool:
        return client.ending is not None or client.error is not None or len(calls) > num_played

    while True:
        await until(goes_on, DEADLINE_S, "somebody is asked, or all is said")
        if len(calls) == num_played:
            return
        call = calls[num_played]
        num_played, request = num_played + 1, call.body
        position, end = request.num_generated, min(len(whole), request.num_generated + lifespan)
        assert list(request.tokens[len(request.tokens) - position :]) == whole[:position]
        account: Any = [WorkerAccount(num_cached_tokens=1)]
        for place in range(position, end):
            item: list[Any] = [place, whole[place]]
            if request.sampling.logprobs >= 0:
                item = [item, [(-0.25 * place, ((whole[place], -0.25 * place), (7, -3.0)))]]
            call.send([*account, *item])
            account = []
        if end < len(whole):
            call.fail(PeerLost("it died"))
        else:
            call.end({"reason": "stop", "account": WorkerAccount(num_cached_tokens=1)})


def by_choice(client: Client) -> list[Any]:
    """What the client got: the answers to one prompt come in any order."""
    return sorted(client.items, key=lambda item: getattr(item, "choice", 0))


@pytest.mark.parametrize(
    ("asked", "text", "card"),
    [
        pytest.param({}, "hé€ 🙂 ok", {}, id="half characters"),
        pytest.param({"logprobs": 1}, "aé€🙂", {}, id="log probabilities"),
        pytest.param({"logprobs": 1, "stop": ("END", "é!")}, "one E EN aé! more", {}, id="stop strings"),
        pytest.param({"n": 3, "echo": True}, "abc", {}, id="several answers and the prompt"),
        pytest.param({"min_tokens": 6, "stop": ("b",)}, "abababab", {}, id="least tokens"),
        pytest.param({**CHAT, "tool_choice": "required"}, CALL, {}, id="a call that is demanded"),
        pytest.param(
            {**CHAT, "tool_choice": "auto"},
            f"<think>héh</think>well<tool_call>{CALL}</tool_call>",
            {"features": ("tool_text", "tools"), "chat_template": "{{ tools }}<tool_call>"},
            id="reasoning and calls in the text",
        ),
    ],
)
def test_what_a_client_gets_does_not_depend_on_where_workers_are_lost(asked: dict[str, Any], text: str, card: dict[str, Any]) -> None:
    async def check() -> None:
        said = []
        for lifespan in (1000, 1, 2, 3):
            async with scene(**card) as found, another_worker(found, found.worker):
                client = found.ask(**asked, seed=3, wants_receipt=True, wants_start=False)
                await play(found, client, text, lifespan)
                ending = await client.end()
                receipt = ending.receipt or {}
                said.append((by_choice(client), ending.reason, ending.stop, receipt["tokens"]))
                sampled = [call.body.sampling for call in found.worker.calls]
                attempts = [call.body.attempt for call in found.worker.calls if call.body.sampling.choice == 0]
                assert attempts == list(range(len(attempts))), "each continuation has a number of its own"
                assert all(each.seed == 3 for each in sampled)
                if lifespan < len(text.encode()):
                    assert receipt["migrations"] == len(receipt["continuations"]) > 0
                    assert all(each["outcome"] == "peer_lost" for each in receipt["continuations"])
                assert abs(sum(receipt["phases_ms"].values()) - receipt["total_ms"]) < 0.001
        assert all(found == said[0] for found in said[1:])

    run_async(check())
