"""What people can see of the handoff: `/metrics`, and the attempts in a receipt."""

from concurrent.futures import ThreadPoolExecutor

from prometheus_client.parser import text_string_to_metric_families

from tests.harness import Lan, wait_until
from tests.lan.meshes import HTTP, READY_S, LanMesh, long_prompts, start_disaggregated, text_of, undisturbed


def totals(mesh: LanMesh) -> dict[str, float]:
    """All samples of `/metrics`, summed over the peers."""
    response = mesh.front.get(f"{HTTP}/metrics")
    assert response.status == 200
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(response.body.decode()):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_metrics_and_receipts_tell_what_the_handoff_did(lan: Lan) -> None:
    mesh = start_disaggregated(lan)
    mesh.wait_until_all_meet()
    answers = [mesh.complete(prompt) for prompt in long_prompts(4)]
    receipts = [answer["meshserve"] for answer in answers]
    blocks, num_bytes = (sum(receipt["kv"][key] for receipt in receipts) for key in ("blocks", "bytes"))
    found = totals(mesh)
    assert found["meshserve_kv_blocks_received_total"] == found["meshserve_kv_blocks_sent_total"] == blocks > 0
    assert found["meshserve_kv_bytes_received_total"] == num_bytes
    assert found["meshserve_claims_granted_total"] == found["meshserve_prefill_tasks_done_total"] == 4
    assert found["meshserve_prefill_wait_seconds_count"] == found["meshserve_kv_transfer_seconds_count"] == 4
    for name in ("kv_blocks_refused_total", "prefill_attempts_failed_total", "tickets_hedged_total", "prefill_queue_depth"):
        assert found[f"meshserve_{name}"] == 0
    assert found["meshserve_peer_up"] == 4
    for receipt in receipts:
        (attempt,) = receipt["attempts"]
        assert attempt["outcome"] == "done" and attempt["peer"] == receipt["peers"]["prefill"]
        assert (attempt["blocks"], attempt["bytes"]) == (receipt["kv"]["blocks"], receipt["kv"]["bytes"])
        assert attempt["waited_ms"] >= 0 and attempt["ms"] > 0 and attempt["hedged"] is False


def test_the_queues_depth_shows_while_prompts_wait(lan: Lan) -> None:
    mesh = start_disaggregated(lan, "--engine-opt", "prefill_tokens_per_s=2000")
    mesh.wait_until_all_meet()
    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(mesh.complete, prompt) for prompt in long_prompts(6)]
        wait_until(lambda: totals(mesh)["meshserve_prefill_queue_depth"] >= 4, READY_S, "prompts wait")
        assert all(future.result() for future in running)
    wait_until(lambda: totals(mesh)["meshserve_prefill_queue_depth"] == 0, READY_S, "none waits")


def test_with_a_pool_for_three_prompts_twenty_take_their_turns(lan: Lan) -> None:
    mesh = start_disaggregated(lan, "--engine-opt", "num_blocks=200")
    mesh.wait_until_all_meet()
    prompts = long_prompts(20)
    texts = [text_of(answer) for answer in mesh.complete_all(prompts, 20)]
    assert texts == undisturbed(lan, prompts)
    loads = [peer["load"] for peer in mesh.peers() if peer["load"]]
    assert not any(load["used_blocks"] or load["num_waiting"] for load in loads)


def test_a_prompt_that_no_pool_can_hold_is_refused_with_400_and_holds_nothing(lan: Lan) -> None:
    mesh = start_disaggregated(lan, "--engine-opt", "num_blocks=20")
    mesh.wait_until_all_meet()
    body = {"model": "dummy", "prompt": long_prompts(1)[0], "max_tokens": 4}
    response = mesh.front.post_json(f"{HTTP}/v1/completions", body, timeout_s=60.0)
    assert response.status == 400 and response.json()["error"]["code"] == "context_length_exceeded"
    assert not any(peer["load"]["used_blocks"] for peer in mesh.peers() if peer["load"])
