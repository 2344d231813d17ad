"""Row 33: peers of two protocol versions, two models and two KV layouts in one mesh."""

import sys
from typing import Any

import pytest

from tests.harness import Lan
from tests.lan.meshes import HTTP, READY_S, SLOW_PREFILL, LanMesh, long_prompts, text_of

OLDER = """
import meshserve.config as config
config.PROTOCOL_MAJOR -= 1
from meshserve.cli.main import main
main()
"""
"""A meshserve of the protocol version before."""


def test_row_33_a_peer_of_another_protocol_version_is_refused_and_its_user_told_to_upgrade(
    lan: Lan,
) -> None:
    front, older_host = lan.add_host(), lan.add_host()
    mesh = LanMesh(front, front.run("--role", "frontend,processor,router"))
    mesh.decode = [lan.add_host().run("--role", "decode")]
    mesh.wait_until_ready()
    older = older_host.start(
        sys.executable, "-c", OLDER, "run", "--role", "decode,prefill", "--name", "older"
    )
    older.ready(READY_S)
    for process in (mesh.frontend, older):
        process.wait_for_line("speaks protocol .*upgrade meshserve of older", READY_S)
    names = {
        answer["meshserve"]["peers"]["decode"] for answer in mesh.complete_all(long_prompts(8), 4)
    }
    assert names == set(mesh.names(mesh.decode))
    assert len(mesh.peers()) == 2 and not mesh.frontend.find_line("^2 decode|1 prefill")


def answers_of(mesh: LanMesh, model: str, prompts: list[str]) -> list[dict[str, Any]]:
    """What this model says, with receipts."""
    return [mesh.complete(prompt, model=model) for prompt in prompts]


def alone(lan: Lan, prompts: list[str], *options: str) -> list[str]:
    """What a peer with these options says that is alone."""
    host = lan.add_host()
    one = LanMesh(host, host.run("--role", "all", "--mesh", "undisturbed", *options))
    one.frontend.wait_for_line("^1 decode, 1 prefill ready", READY_S)
    return [text_of(answer) for answer in answers_of(one, options[1], prompts)]


@pytest.mark.full
def test_row_33_two_models_are_kept_apart(lan: Lan) -> None:
    front, prompts = lan.add_host(), long_prompts(8)
    models = {name: ("--model", name) for name in ("small", "large")}
    mesh = LanMesh(front, front.run("--role", "frontend,processor,router"))
    mesh.decode = [
        lan.add_host().run("--role", "decode", *SLOW_PREFILL, *options)
        for options in models.values()
    ]
    mesh.prefill = [
        lan.add_host().run("--role", "prefill", *options) for options in models.values()
    ]
    mesh.wait_until_ready()
    mesh.wait_until_all_meet()
    workers = zip(mesh.names(mesh.decode), mesh.names(mesh.prefill), strict=True)
    for (model, options), (decode, prefill) in zip(models.items(), workers, strict=True):
        answers = answers_of(mesh, model, prompts)
        peers = [answer["meshserve"]["peers"] for answer in answers]
        assert {found["decode"] for found in peers} == {decode} and {
            found["prefill"] for found in peers
        } == {prefill}
        assert [text_of(answer) for answer in answers] == alone(lan, prompts, *options)


@pytest.mark.full
def test_row_33_workers_of_one_model_name_and_two_kv_layouts_exchange_no_blocks_and_that_is_said(
    lan: Lan,
) -> None:
    front, prompts = lan.add_host(), long_prompts(8)
    layouts = {"16": ("--engine-opt", "block_size=16"), "32": ("--engine-opt", "block_size=32")}
    mesh = LanMesh(front, front.run("--role", "frontend,processor,router"))
    mesh.decode = [
        lan.add_host().run("--role", "decode", *SLOW_PREFILL, *options)
        for options in layouts.values()
    ]
    mesh.prefill = [lan.add_host().run("--role", "prefill", *layouts["32"])]
    mesh.wait_until_ready()
    mesh.wait_until_all_meet()
    mesh.frontend.wait_for_line("2 different models are called 'dummy'", READY_S)
    answers = answers_of(mesh, "dummy", prompts)
    names = mesh.names(mesh.decode)
    used = {
        (answer["meshserve"]["peers"]["decode"], answer["meshserve"]["peers"]["prefill"])
        for answer in answers
    }
    assert used == {(names[0], None), (names[1], *mesh.names(mesh.prefill))}
    (listed,) = mesh.front.get(f"{HTTP}/v1/models").json()["data"]
    assert len(listed["variants"]) == 2, listed
    # to the dummy model its KV layout is part of what it is: each worker has answers of its own
    expected = {
        name: alone(lan, prompts, "--model", "dummy", *options)
        for name, options in zip(names, layouts.values(), strict=True)
    }
    for place, answer in enumerate(answers):
        assert text_of(answer) == expected[answer["meshserve"]["peers"]["decode"]][place]
