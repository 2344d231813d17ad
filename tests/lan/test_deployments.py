"""The two deployments of the example that this project grew from, each peer started by one `meshserve run` without addresses."""

from pathlib import Path

from tests.harness import Lan
from tests.lan.meshes import HTTP, LONG_PROMPT, READY_S, SHORT_PROMPT, SLOW_PREFILL, start_aggregated, start_disaggregated, text_of

PROMPTS = [f"{number}: {text}" for number in range(6) for text in (SHORT_PROMPT, LONG_PROMPT)]


def test_aggregated_on_two_hosts_spreads_queries_over_both_decode_workers(lan: Lan) -> None:
    mesh = start_aggregated(lan)
    names = mesh.names(mesh.decode)
    line = mesh.frontend.wait_for_line(r"^2 decode, 0 prefill ready: .*", READY_S)[0]
    assert all(name in line for name in names)
    answers = [mesh.complete(prompt) for prompt in PROMPTS]
    assert {answer["meshserve"]["peers"]["decode"] for answer in answers} == set(names)
    assert all(answer["meshserve"]["peers"]["prefill"] is None for answer in answers)


def test_disaggregated_on_three_hosts_hands_long_prompts_over_and_answers_the_same(lan: Lan) -> None:
    mesh = start_aggregated(lan)
    expected = [text_of(mesh.complete(prompt)) for prompt in PROMPTS]
    fresh = {f"{number} and {prompt}": None for number, prompt in enumerate(PROMPTS)}
    undisturbed = [text_of(mesh.complete(prompt)) for prompt in fresh]
    mesh.prefill = [lan.add_host().run("--role", "prefill")]
    mesh.wait_until_ready()
    (prefill_name,) = mesh.names(mesh.prefill)
    newcomer = lan.hosts[1].run("--role", "decode", *SLOW_PREFILL)  # one with an empty cache: what it answers came over the network
    mesh.decode.append(newcomer)
    mesh.wait_until_ready()
    for process in mesh.decode[:2]:
        process.terminate()
        assert process.wait() == 0
    mesh.decode = [newcomer]
    mesh.wait_until_ready()
    mesh.wait_until_all_meet()
    for prompts, texts in ((PROMPTS, expected), (list(fresh), undisturbed)):
        for prompt, text in zip(prompts, texts, strict=True):
            answer = mesh.complete(prompt)
            receipt = answer["meshserve"]
            assert text_of(answer) == text
            is_long = LONG_PROMPT in prompt
            assert receipt["peers"]["prefill"] == (prefill_name if is_long else None)
            assert (receipt["kv"]["bytes"] == (len(prompt) - 1) * 1024 - receipt["tokens"]["cached"] * 1024) or not is_long


def test_short_prompts_are_prefilled_locally_and_receipts_add_up(lan: Lan) -> None:
    mesh = start_disaggregated(lan)
    names = set(mesh.names(mesh.decode))
    answers = [mesh.complete(prompt) for prompt in PROMPTS]
    assert {answer["meshserve"]["peers"]["decode"] for answer in answers} == names
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        receipt = answer["meshserve"]
        assert (receipt["peers"]["prefill"] is not None) == (LONG_PROMPT in prompt)
        assert sum(receipt["phases_ms"].values()) <= receipt["total_ms"] * 1.02 + 0.1
        assert receipt["tokens"] == {
            "prompt": len(prompt),
            "cached": receipt["tokens"]["cached"],
            "completion": answer["usage"]["completion_tokens"],
        }


def test_with_a_key_only_its_holders_get_in(lan: Lan, tmp_path: Path) -> None:
    key, other = tmp_path / "mesh.key", tmp_path / "other.key"
    host = lan.add_host("keys")
    for path in (key, other):
        assert host.meshserve("key", "new", str(path)).exit_code == 0
    mesh = start_disaggregated(lan, "--key-file", str(key))
    mesh.wait_until_all_meet()
    answer = mesh.complete(LONG_PROMPT)
    assert answer["meshserve"]["peers"]["prefill"] is not None
    strangers = [host.run("--role", "decode"), host.run("--role", "decode", "--key-file", str(other))]
    for stranger in strangers:
        name = stranger.ready(READY_S)["name"]
        stranger.wait_for_line("cannot join|no other peer", READY_S)
        assert name not in [peer["name"] for peer in mesh.peers()]
    assert len(mesh.peers()) == 4


def test_the_http_side_says_what_is_missing_until_a_request_could_be_served(lan: Lan) -> None:
    host = lan.add_host()
    frontend = host.run("--role", "frontend,processor,router")
    frontend.ready(READY_S)
    answer = host.get(f"{HTTP}/ready")
    assert (answer.status, answer.json()["missing"]) == (503, ["decode"])
    assert host.get(f"{HTTP}/health").status == 200
    assert host.post_json(f"{HTTP}/v1/completions", {"model": "dummy", "prompt": "hi"}).status == 503
    lan.add_host().run("--role", "decode")
    frontend.wait_for_line("^1 decode", READY_S)
    assert host.get(f"{HTTP}/ready").status == 200
    assert [model["id"] for model in host.get(f"{HTTP}/v1/models").json()["data"]] == ["dummy"]
