"""Real input: requests of a public trace over HTTP to the three-host mesh."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Lan
from tests.lan.meshes import LanMesh, start_disaggregated, text_of

TRACE = Path(__file__).parents[3] / "shared" / "traces" / "mooncake_synthetic.jsonl"
BLOCK_TOKENS = 512
MAX_PROMPT_TOKENS = 4096

pytestmark = [pytest.mark.full, pytest.mark.skipif(not TRACE.exists(), reason="the trace is not here")]


def block_text(block_id: int) -> str:
    """512 characters, which are as many tokens; equal ids give equal text."""
    words = f"block {block_id} says {block_id * 2654435761 % 2**32}; "
    return (words * (BLOCK_TOKENS // len(words) + 1))[:BLOCK_TOKENS]


def prompt_of(request: dict[str, Any]) -> str:
    """The request's blocks, its length, and at most what the test allows."""
    text = "".join(block_text(block_id) for block_id in request["hash_ids"][: MAX_PROMPT_TOKENS // BLOCK_TOKENS])
    return text[: min(request["input_length"], MAX_PROMPT_TOKENS)]


def ask_all(mesh: LanMesh, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    prompts = [prompt_of(request) for request in requests]
    return mesh.complete_all(prompts, num_at_once=32, max_tokens=48)


def test_two_hundred_requests_of_a_trace_are_answered_as_an_aggregated_mesh_answers_them(lan: Lan) -> None:
    with TRACE.open() as file:
        requests = [json.loads(line) for _, line in zip(range(200), file, strict=False)]
    mesh = start_disaggregated(lan, "--engine-opt", "num_blocks=16384")
    answers = ask_all(mesh, requests)
    with Lan() as other:
        host = other.add_host()
        alone = LanMesh(host, host.run("--role", "all", "--max-local-prefill-tokens", "1000000"))
        alone.frontend.wait_for_line("^1 decode", 10)
        expected = ask_all(alone, requests)
    assert [text_of(answer) for answer in answers] == [text_of(answer) for answer in expected]
    assert all(answer["meshserve"]["peers"]["prefill"] is None for answer in expected)
    receipts = [answer["meshserve"] for answer in answers]
    remote = [receipt for receipt in receipts if receipt["peers"]["prefill"]]
    blocks = sum(receipt["kv"]["blocks"] for receipt in receipts)
    size_mb = sum(receipt["kv"]["bytes"] for receipt in receipts) / 1e6
    cached_share = sum(receipt["tokens"]["cached"] for receipt in receipts) / sum(receipt["tokens"]["prompt"] for receipt in receipts)
    moved = f"{blocks} blocks moved ({size_mb:.0f} MB)"
    print(f"200 correct, 0 errors; {len(remote)} prefilled remotely, {moved}, {cached_share:.0%} of prompt tokens cached")
    assert len(remote) > 50 and blocks > 1000
