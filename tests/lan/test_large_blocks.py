"""KV blocks of 20 MiB over any link: row 41. They travel in short frames, so that a slow link is seen to be alive."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Host, Lan, wait_until
from tests.harness.records import Record
from tests.lan.meshes import HTTP, READY_S, LanMesh, text_of

BLOCK_TOKENS, NUM_BLOCKS = 64, 5
KV_BYTES_PER_TOKEN = 320 * 1024
BLOCK_BYTES = BLOCK_TOKENS * KV_BYTES_PER_TOKEN
BIG_BLOCKS = ("--engine-opt", f"kv_bytes_per_token={KV_BYTES_PER_TOKEN}", "--engine-opt", f"block_size={BLOCK_TOKENS}")
PROMPT = "The prompt of five large blocks. ".ljust(BLOCK_TOKENS * NUM_BLOCKS + 1, "x")
"""The dummy model has a token for each letter; the last one is computed by the decode worker."""


def start(front: Host, decode: Host, prefill: Host, *options: str) -> LanMesh:
    """A mesh whose blocks have 20 MiB, and whose prompts are all handed over."""
    options = (*BIG_BLOCKS, *options)
    mesh = LanMesh(front, front.run("--role", "frontend,processor,router", *options))
    mesh.decode = [decode.run("--role", "decode", "--max-local-prefill-tokens", "64", *options)]
    mesh.prefill = [prefill.run("--role", "prefill", *options)]
    mesh.wait_until_ready()
    mesh.wait_until_all_meet()
    return mesh


def key_options(host: Host, has_key: bool, directory: Path) -> tuple[str, ...]:
    """What gives all peers one key, if they are to have one."""
    if not has_key:
        return ()
    path = directory / "mesh.key"
    assert host.meshserve("key", "new", str(path)).exit_code == 0
    return ("--key-file", str(path))


def complete(mesh: LanMesh, timeout_s: float) -> dict[str, Any]:
    """The prompt's answer, with its receipt."""
    body = {"model": "dummy", "prompt": PROMPT, "max_tokens": 16, "meshserve": {"receipt": True}}
    response = mesh.front.post_json(f"{HTTP}/v1/completions", body, timeout_s=timeout_s)
    assert response.status == 200, response.body
    answer: dict[str, Any] = response.json()
    return answer


def assert_handed_over(answer: dict[str, Any]) -> None:
    """All blocks came with the first attempt."""
    receipt = answer["meshserve"]
    assert [attempt["outcome"] for attempt in receipt["attempts"]] == ["done"]
    assert receipt["kv"] == {"blocks": NUM_BLOCKS, "bytes": NUM_BLOCKS * BLOCK_BYTES}


def computed_alone(lan: Lan) -> str:
    """What a peer alone answers."""
    host = lan.add_host()
    alone = LanMesh(host, host.run("--role", "all", "--mesh", "alone", *BIG_BLOCKS))
    alone.frontend.wait_for_line("^1 decode, 1 prefill ready", READY_S)
    return text_of(complete(alone, 60.0))


@pytest.mark.parametrize("has_key", [False, True], ids=["open", "key"])
def test_row_41_blocks_of_20_mib_are_handed_over_on_loopback(lan: Lan, tmp_path: Path, has_key: bool) -> None:
    host = lan.add_host()
    answer = complete(start(host, host, host, *key_options(host, has_key, tmp_path)), 60.0)
    assert_handed_over(answer)
    assert text_of(answer) == computed_alone(lan)


MBIT = 1_000_000 // 8
"""Bytes a second."""


@pytest.mark.parametrize(
    ("rate_mbit", "has_key"),
    [(100, False), (100, True), pytest.param(4, False, marks=pytest.mark.full)],
    ids=["100_mbit", "100_mbit_key", "4_mbit"],
)
def test_row_41_blocks_of_20_mib_are_handed_over_on_a_slow_link(
    lan: Lan, tmp_path: Path, rate_mbit: int, has_key: bool
) -> None:
    front, far = lan.add_host(), lan.add_host()
    mesh = start(front, front, far, *key_options(front, has_key, tmp_path))
    far.limit_rate(rate_mbit * MBIT)
    answer = complete(mesh, 60.0 + 1000.0 / rate_mbit)
    far.unblock()
    assert_handed_over(answer)
    assert text_of(answer) == computed_alone(lan)


BULK_PORT = 7801
FAULT_RATE = 100 * MBIT


def start_with_two(lan: Lan, record: Path) -> LanMesh:
    """A decode worker on a host of its own, and two prefill workers behind links of 100 Mbit/s, which write a record."""
    options = (*BIG_BLOCKS, "--record", str(record))
    front = lan.add_host()
    mesh = start(front, lan.add_host(), lan.add_host(), "--record", str(record))
    mesh.prefill.append(lan.add_host().run("--role", "prefill", *options))
    mesh.wait_until_ready()
    mesh.wait_until_all_meet()
    for host in lan.hosts[2:]:
        host.limit_rate(FAULT_RATE)
    return mesh


def assert_continued(answer: dict[str, Any], record: Path) -> None:
    """The second attempt brought what the first had not."""
    Record(record).check()
    first, second = answer["meshserve"]["attempts"]
    assert second["outcome"] == "done" and first["peer"] != second["peer"]
    kept = [event for event in Record(record).of("block") if event.details["attempt"] == first["attempt"]]
    assert second["blocks"] == NUM_BLOCKS - len(kept)


def test_a_flipped_bit_in_one_frame_costs_an_attempt_and_no_wrong_token(lan: Lan, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    mesh = start_with_two(lan, record)
    lan.hosts[1].flip_one_bit(BULK_PORT)
    answer = complete(mesh, 60.0)
    assert_continued(answer, record)
    assert answer["meshserve"]["attempts"][0]["outcome"].startswith("block refused")
    assert text_of(answer) == computed_alone(lan)


@pytest.mark.parametrize("num_kept", [1, 3])
def test_a_sender_killed_after_some_blocks_leaves_only_the_others_to_its_successor(lan: Lan, tmp_path: Path, num_kept: int) -> None:
    record = tmp_path / "record.jsonl"
    mesh = start_with_two(lan, record)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete, mesh, 60.0)
        wait_until(lambda: record.exists() and len(Record(record).of("block")) >= num_kept, READY_S, "so many blocks have come")
        names = {peer["incarnation"]: peer["name"] for peer in mesh.peers()}
        sender = names[Record(record).of("block")[0].details["peer_sending"]]
        mesh.prefill[mesh.names(mesh.prefill).index(sender)].kill()
        answer = running.result()
    assert_continued(answer, record)
    first, second = answer["meshserve"]["attempts"]
    assert (first["blocks"], second["blocks"]) == (num_kept, NUM_BLOCKS - num_kept)
    assert second["bytes"] == second["blocks"] * BLOCK_BYTES, "another incarnation begins a block anew"
    assert text_of(answer) == computed_alone(lan)


def test_a_sender_whose_connection_breaks_in_the_middle_of_a_block_sends_only_the_rest(lan: Lan, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    front, decode, prefill = lan.add_host(), lan.add_host(), lan.add_host()
    mesh = start(front, decode, prefill, "--record", str(record))
    prefill.limit_rate(FAULT_RATE)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete, mesh, 60.0)
        wait_until(lambda: record.exists() and acknowledged_bytes(record) > 1.3 * BLOCK_BYTES, READY_S, "more than a block has come")
        decode.reset_connections(BULK_PORT)
        answer = running.result()
    Record(record).check()
    first, second = answer["meshserve"]["attempts"]
    assert (first["outcome"], second["outcome"]) == ("its link broke", "done")
    assert second["blocks"] == NUM_BLOCKS - first["blocks"] and second["bytes"] < second["blocks"] * BLOCK_BYTES
    assert first["bytes"] + second["bytes"] >= NUM_BLOCKS * BLOCK_BYTES
    assert text_of(answer) == computed_alone(lan)


def acknowledged_bytes(record: Path) -> int:
    """What the sender has heard of, so far."""
    return sum(event.details["num_bytes"] for event in Record(record).of("ack"))
