"""What a router answers to whoever asks it over the mesh, however he asks."""

from array import array
from typing import Any

import pytest

from meshserve.config import MeshConfig
from meshserve.engines.dummy import DummyEngine
from meshserve.engines.protocol import EngineOptions
from meshserve.errors import ProtocolError
from meshserve.mesh.mesh import Mesh
from meshserve.roles.router import RouterRole
from meshserve.routing.workers import CostSettings
from meshserve.wire.messages import ROUTE
from meshserve.wire.routing import RoutingDecision
from meshserve.wire.structs import pack_tokens, replace
from tests.harness import run_async
from tests.routing.test_watches import DEADLINE_S, followed

QUESTION = {"request_id": "r", "model": "dummy", "tokens": pack_tokens(array("I", [1, 2, 3]))}
MALFORMED: list[dict[str, object]] = [
    {"request_id": 1},
    {"model": None},
    {"tokens": b"123"},
    {"policy": ["kv"]},
    {"policy": {"kv": 1}},
    {"session": 5},
    {"excluded": "w"},
    {"excluded": [["w"]]},
    {"excluded": [{}]},
]


def test_a_malformed_question_is_answered_with_what_is_wrong_and_the_next_one_with_a_worker() -> None:
    async def ask() -> None:
        async with followed() as pair:
            router = pair.router.incarnation
            for change in MALFORMED:
                with pytest.raises(ProtocolError):
                    await pair.worker.call(router, ROUTE, {**QUESTION, **change}, DEADLINE_S)
            answer = await pair.worker.call(router, ROUTE, QUESTION, DEADLINE_S)
            assert answer.decode[0].incarnation == pair.worker.incarnation

    run_async(ask())


async def answer_for(prompt: "array[int]", settings: CostSettings | None = None, **layout: Any) -> RoutingDecision:
    """Of a router on a peer that decodes and prefills by name only."""
    engine = DummyEngine(EngineOptions(None, {}))
    roles = ("router", "decode", "prefill")
    config = MeshConfig(mesh="asked", roles=roles, interface="127.0.0.1", use_mdns=False)
    mesh = Mesh(config, engine.card, replace(engine.kv_layout, **layout))
    await mesh.start()
    role = RouterRole(mesh, "kv", settings)
    try:
        found: RoutingDecision = await mesh.call(mesh.incarnation, ROUTE, {**QUESTION, "tokens": pack_tokens(prompt)}, DEADLINE_S)
        return found
    finally:
        role.close()
        await mesh.close()


def wait_ms(answer: RoutingDecision) -> float:
    return answer.decode[0].wait_ms


def test_a_prompt_that_its_decode_worker_computes_itself_is_not_waited_for_elsewhere() -> None:
    prompt = array("I", [1] * 1000)
    assert wait_ms(run_async(answer_for(prompt))) > 0
    assert wait_ms(run_async(answer_for(prompt, CostSettings(max_local_prefill_tokens=1000)))) == 0


def test_an_engine_that_hands_nothing_over_has_no_prefill_workers() -> None:
    prompt = array("I", [1] * 1000)
    assert run_async(answer_for(prompt)).prefill
    answer = run_async(answer_for(prompt, refusal="this engine does not"))
    assert not answer.prefill and wait_ms(answer) == 0
