"""Sequences that lose their worker after every single token, with workers that are played by hand: a client notices nothing."""

import json
from array import array
from typing import Any

import pytest

from meshserve.app import Peer
from meshserve.config import MeshConfig, ServeConfig
from meshserve.errors import GaveUp, PeerLost, PoolFull
from meshserve.wire.generation import GenerateRequest, Sampling, WorkerAccount
from meshserve.wire.messages import GENERATE
from tests.harness import run_async, until
from tests.roles.scripted import DEADLINE_S, Client, Scene, another_worker, scene, tokens

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


async def lose(found: Scene, count: int, num_tokens: int) -> None:
    """Have so many workers in a row die, each after so many tokens of x."""
    first = len(found.worker.calls)
    for index in range(first, first + count):
        request = (await found.worker.asked(index + 1))[index]
        for place in range(num_tokens):
            found.worker.calls[index].send([request.num_generated + place, ord("x")])
        found.worker.calls[index].fail(PeerLost("it died"))


def test_only_losses_in_a_row_without_a_token_count_against_a_request() -> None:
    async def check() -> None:
        async with scene() as found, another_worker(found, found.worker):
            client = found.ask(max_tokens=100)
            for num_tokens in (0, 2, 0, 1, 0, 1):
                await lose(found, 1, num_tokens)
            await lose(found, 2, 0)
            error = await client.failure()
            assert isinstance(error, GaveUp) and len(error.lost_peers) == 2
            assert "".join(client.raw) == "xxxx" and found.processor.is_idle

    run_async(check())


def test_a_request_goes_on_elsewhere_as_often_as_it_may_and_no_more() -> None:
    async def check() -> None:
        async with scene() as found, another_worker(found, found.worker):
            found.processor.dispatcher.max_migrations = 3
            client = found.ask(max_tokens=100)
            await lose(found, 4, 1)
            assert (await client.failure()).code == "peer_lost"
            assert "".join(client.raw) == "xxxx" and found.processor.is_idle

    run_async(check())


def test_of_a_request_that_has_all_its_tokens_nothing_but_the_end_can_be_lost() -> None:
    async def check() -> None:
        async with scene() as found:
            client = found.ask(max_tokens=4, wants_receipt=True)
            await lose(found, 1, 4)
            ending = await client.end()
            assert (ending.reason, ending.num_completion_tokens) == ("length", 4) and len(found.worker.calls) == 1
            assert ending.receipt is not None and ending.receipt["migrations"] == 0

    run_async(check())


def test_a_request_that_has_begun_waits_for_a_worker_and_ends_in_an_error_if_none_comes() -> None:
    async def check() -> None:
        async with scene(failure_timeout_s=0.1, death_timeout_s=0.2) as found:
            client = found.ask(max_tokens=100)
            await lose(found, 1, 3)
            await found.worker.asked(2)  # by the one that was lost: it may be the one that comes back
            found.mesh.announce_draining()
            began_s = found.mesh.now_s()
            found.worker.calls[1].send([3, ord("x")])
            found.worker.calls[1].fail(PeerLost("it died"))
            assert (await client.failure()).code == "no_worker"
            assert found.mesh.now_s() - began_s >= 0.3 and found.processor.is_idle

    run_async(check())


def test_workers_that_are_full_cost_a_request_that_has_begun_time_and_nothing_else() -> None:
    async def check() -> None:
        async with scene() as found, another_worker(found, found.worker):
            client = found.ask(max_tokens=100)
            (request,) = await found.worker.asked(1)
            found.worker.calls[0].send([0, *b"xxx"])
            found.worker.error = PoolFull("no room")
            found.worker.calls[0].fail(PeerLost("it died"))
            await found.worker.asked(6)
            found.worker.error = None
            await until(lambda: found.worker.calls[-1].is_open, DEADLINE_S, "one has room again")
            assert found.worker.calls[-1].body.tokens == request.tokens + tokens("xxx")
            found.worker.say(-1, "y", position=3)
            await client.end()
            assert "".join(client.raw) == "xxxy"

    run_async(check())


def test_a_client_that_leaves_while_its_request_waits_for_a_worker_ends_the_waiting() -> None:
    async def check() -> None:
        async with scene() as found:
            client = found.ask(max_tokens=100)
            await lose(found, 1, 3)
            found.mesh.announce_draining()
            assert client.call is not None
            client.call.cancel()
            await until(lambda: found.processor.is_idle, DEADLINE_S, "nothing is under way")

    run_async(check())


class Rest(Client):
    """Who asked a worker: tokens come with their positions."""

    def on_end(self, value: Any) -> None:
        self.ending = value

    @property
    def tokens(self) -> list[int]:
        return [token for item in self.raw for token in item[2 if isinstance(item[0], tuple) else 1 :]]


def test_a_worker_drops_an_attempt_for_a_later_one_of_the_same_request_and_for_no_other() -> None:
    async def check() -> None:
        config = MeshConfig(mesh="attempts", roles=("decode",), interface="127.0.0.1", use_mdns=False)
        peer = Peer(config, ServeConfig(engine_options=(("step_ms", "5"),)), lambda line: None)
        await peer.start()
        try:
            asked = GenerateRequest("r", "dummy", tokens("ab"), Sampling(max_tokens=40, ignore_eos=True))

            def ask(request: GenerateRequest) -> Rest:
                sink = Rest()
                peer.mesh.open(peer.mesh.incarnation, GENERATE, request, sink, 30.0)
                return sink

            first = ask(asked)
            await until(lambda: len(first.tokens) >= 5, DEADLINE_S, "it has begun")
            so_far = asked.tokens + array("I", first.tokens[:5])
            late = ask(asked)
            assert (await late.failure()).code == "invalid_request" and first.error is None
            second = ask(GenerateRequest("r", "dummy", so_far, asked.sampling, 5, attempt=1))
            assert (await first.failure()).code == "cancelled"
            await until(lambda: second.ending is not None, DEADLINE_S, "the later attempt ends")
            whole = ask(GenerateRequest("other", "dummy", asked.tokens, asked.sampling))
            await until(lambda: whole.ending is not None, DEADLINE_S, "undisturbed")
            assert first.tokens[:5] + second.tokens == whole.tokens
        finally:
            await peer.stop()

    run_async(check())
