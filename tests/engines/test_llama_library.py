"""The lowest layer of the llama engine, on tiny models: library, model, context, blocks, probe."""

import importlib.util
import os
import random
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

if importlib.util.find_spec("xllamacpp") is None:
    pytest.skip("xllamacpp is not installed", allow_module_level=True)
pytest.importorskip("gguf")

from meshserve.engines.llama.blocks import BlockFormat, layout_fingerprint
from meshserve.engines.llama.context import LlamaContext
from meshserve.engines.llama.library import CONTEXT_DEFAULTS, ContextParams, check_defaults, load_library
from meshserve.engines.llama.model import LlamaModel
from meshserve.engines.llama.probe import probe
from meshserve.errors import BlockRefused, EngineFailed, PoolFull, StartupFailed
from tests.engines.tiny_models import CHAT_TEMPLATE, MODELS, VOCABULARY, make_model

BLOCKS_KINDS = ["dense", "moe", "sliding-window"]
TOKENS = array("i", random.Random(7).choices(range(5, VOCABULARY), k=400))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: make_model(folder / f"{kind}.gguf", model) for kind, model in MODELS.items()}


@pytest.fixture(scope="module")
def models(files: dict[str, Path]) -> Iterator[dict[str, LlamaModel]]:
    loaded = {kind: LlamaModel(path) for kind, path in files.items() if kind != "embedding"}
    yield loaded
    for model in loaded.values():
        model.close()


@pytest.fixture
def contexts(models: dict[str, LlamaModel]) -> Iterator[Callable[..., LlamaContext]]:
    made = []

    def make(kind: str = "dense", **options: Any) -> LlamaContext:
        settings = {"num_cells": 512, "num_sequences": 6, "max_batch": 64, "max_outputs": 8, "num_threads": 1, **options}
        made.append(LlamaContext(models[kind], **settings))
        assert (probe(made[-1], models[kind]) == "") is (kind in BLOCKS_KINDS)
        return made[-1]

    yield make
    for context in made:
        context.close()
        context.close()


def compute(context: LlamaContext, sequence: int, first: int, end: int, chunk: int = 64) -> list[float]:
    """Decode these positions of TOKENS in chunks; returns the last one's logits."""
    for start in range(first, end, min(chunk, context.max_batch)):
        count = min(chunk, context.max_batch, end - start)
        wants = [False] * (count - 1) + [True]
        assert context.decode(TOKENS[start : start + count], range(start, start + count), [sequence] * count, wants)
    return list(context.logits(count - 1))


# --- the library


def test_declarations_that_are_shifted_by_one_field_are_noticed() -> None:
    library = load_library()
    params = bytes(library.functions.llama_context_default_params())
    check_defaults(library, ContextParams.from_buffer_copy(params), CONTEXT_DEFAULTS)
    for offset in range(0, len(params) - 32, 4):  # behind it are null pointers only
        shifted = params[:offset] + bytes([7, 0, 0, 0]) + params[offset:-4]
        with pytest.raises(StartupFailed, match="is not the build that was declared"):
            check_defaults(library, ContextParams.from_buffer_copy(shifted), CONTEXT_DEFAULTS)


def test_a_library_says_its_build_and_the_processor_it_computes_with() -> None:
    library = load_library()
    assert library is load_library()
    assert library.build.startswith("xllamacpp-2026")
    assert "CPU" in library.processor_class


def test_another_version_of_the_library_is_refused_in_one_line_before_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "xllamacpp").mkdir()
    (tmp_path / "xllamacpp" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "xllamacpp-1.0.dist-info").mkdir()
    (tmp_path / "xllamacpp-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: xllamacpp\nVersion: 1.0\n")
    program = "from meshserve.engines.llama.library import load_library\ntry: load_library()\nexcept Exception as e: print(e)"
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert "xllamacpp 1.0 is installed, and this meshserve works with 2026" in done.stdout
    assert "pip install" in done.stdout and done.stdout.count("\n") == 1


# --- the model


def test_a_model_says_what_it_is(models: dict[str, LlamaModel]) -> None:
    model = models["dense"]
    assert (model.architecture, model.n_layer, model.n_ctx_train, model.vocabulary_size) == ("llama", 2, 4096, VOCABULARY)
    assert (model.bos_token, model.eos_token, model.adds_bos, model.chat_template) == (1, 2, True, CHAT_TEMPLATE)
    assert (model.metadata("general.name"), model.metadata("general.nothing")) == ("tiny llama", None)
    assert [token for token in range(-1, VOCABULARY + 1) if model.is_end_of_generation(token)] == [2, 4]
    assert [kind for kind, found in models.items() if found.is_recurrent or found.is_hybrid] == ["hybrid", "recurrent"]
    assert models["sliding-window"].sliding_window == 80


@given(st.text(max_size=300))
def test_pieces_of_a_texts_tokens_are_the_text(files: dict[str, Path], text: str) -> None:
    with closing(LlamaModel(files["dense"], vocab_only=True)) as model:
        tokens = model.tokenize(text, False)
        assert b"".join(map(model.piece, tokens)).removeprefix(b" ") == text.encode("utf-8", "replace").removeprefix(b" ")
        assert model.tokenize("<|im_end|>", True)[-1] == 4 != model.tokenize("<|im_end|>", False)[-1]
        with pytest.raises(ValueError, match="not one of"):
            model.piece(VOCABULARY)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"", "is no GGUF file: download"),
        (lambda data: b"PK\3\4" + data[4:], "is no GGUF file: download"),
        (lambda data: data[:4], "is truncated: download it again"),
        (lambda data: data[:5000], "is truncated: download it again"),
        (lambda data: data[: len(data) // 2], "is truncated: download it again"),
        (lambda data: data.replace(b"llama", b"lxama"), r"does not know \(unknown model architecture: 'lxama'\): use another model"),
        (lambda data: data[:4] + b"\x63" + data[5:], r"refuses it \(.* version 99 .*\): use another file"),
    ],
)
def test_files_that_are_no_usable_models_are_refused_in_one_line(
    files: dict[str, Path], tmp_path: Path, change: Callable[[bytes], bytes], words: str
) -> None:
    path = tmp_path / "changed.gguf"
    path.write_bytes(change(files["dense"].read_bytes()))
    with pytest.raises(StartupFailed, match=words) as raised:
        LlamaModel(path)
    assert str(path) in raised.value.message and "\n" not in raised.value.message


def test_what_is_no_file_or_no_generating_model_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    for path, words in [
        (tmp_path / "none", "there is no model file"),
        (tmp_path, "is a directory"),
        (files["embedding"], "an embedding model"),
    ]:
        with pytest.raises(StartupFailed, match=words):
            LlamaModel(path)


# --- steps


@pytest.mark.parametrize("kind", BLOCKS_KINDS)
def test_logits_are_equal_whatever_the_chunks_and_whoever_shares_the_step(kind: str, contexts: Callable[..., LlamaContext]) -> None:
    context = contexts(kind)
    expected = compute(context, 0, 0, 100)
    for sequence, chunk in enumerate((1, 7, 64), start=1):
        assert compute(context, sequence, 0, 100, chunk) == expected
    followers = [1, 2, 3, 0]
    assert context.decode([TOKENS[100]] * 4, [100] * 4, followers, [True] * 4)
    assert len({tuple(context.logits(row)) for row in range(4)}) == 1


def test_a_shared_prefix_gives_the_logits_of_a_computed_one_and_outlives_its_source(contexts: Callable[..., LlamaContext]) -> None:
    context = contexts()
    expected = compute(context, 0, 0, 90)
    context.share(0, 1, 0, 64)
    assert context.remove(0)
    assert compute(context, 1, 64, 90) == expected
    assert context.is_whole(1, 0, 90) and not context.is_whole(0, 0, 90)
    assert context.remove(1, 80)
    assert compute(context, 1, 80, 90, chunk=1) == expected


def test_a_full_pool_takes_nothing_and_changes_nothing(contexts: Callable[..., LlamaContext]) -> None:
    context = contexts(num_cells=256)
    compute(context, 0, 0, 250)
    before = context.export_block(0, 192, 58)
    assert not context.decode(TOKENS[:8], range(8), [1] * 8, [False] * 8)
    assert context.export_block(0, 192, 58) == before
    assert context.decode(TOKENS[:6], range(6), [1] * 6, [False] * 6)


def test_only_recurrent_layers_refuse_to_lose_a_part(contexts: Callable[..., LlamaContext]) -> None:
    for kind in MODELS.keys() - {"embedding"}:
        context = contexts(kind)
        compute(context, 0, 0, 20)
        assert context.remove(0, 10) is (kind in BLOCKS_KINDS)
        assert context.remove(0)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (([], [], [], []), "1 to 64 rows"),
        (([5] * 65, range(65), [0] * 65, [0] * 65), "1 to 64 rows"),
        (([5], [0, 1], [0], [0]), "1 to 64 rows"),
        (([VOCABULARY], [0], [0], [0]), "tokens are from 0 to 511"),
        (([-1], [0], [0], [0]), "tokens are from 0"),
        (([5], [-1], [0], [0]), "positions are from 0 to 511"),
        (([5], [512], [0], [0]), "positions are from 0 to 511"),
        (([5], [0], [5], [0]), "sequences are from 0 to 4"),
        (([5], [0], [-1], [0]), "sequences are from 0 to 4"),
        (([5] * 9, range(9), [0] * 9, [1] * 9), "at most 8 logits"),
    ],
)
def test_steps_that_would_end_the_process_are_refused(
    contexts: Callable[..., LlamaContext], rows: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[bool]], words: str
) -> None:
    context = contexts()
    with pytest.raises(ValueError, match=words):
        context.decode(*rows)


def test_other_misuse_is_refused_too(contexts: Callable[..., LlamaContext], models: dict[str, LlamaModel], files: dict[str, Path]) -> None:
    context = contexts()
    compute(context, 0, 0, 3, chunk=1)
    for misuse in (
        lambda: context.logits(1),
        lambda: context.logits(-1),
        lambda: context.share(0, 5, 0, 1),
        lambda: context.share(-1, 0, 0, 1),
        lambda: context.remove(5),
        lambda: context.remove(0, 3, 2),
        lambda: context.export_block(5, 0, 1),
        lambda: context.export_block(0, -1, 1),
        lambda: context.import_block(5, 0, 1, b""),
        lambda: contexts(num_sequences=257),
        lambda: contexts(max_outputs=65),
    ):
        with pytest.raises(ValueError):
            misuse()
    with pytest.raises(EngineFailed, match=r"a step failed: .*position"):
        context.decode([5], [9], [0], [True])
    with closing(LlamaModel(files["dense"], vocab_only=True)) as model, pytest.raises(ValueError, match="without its weights"):
        LlamaContext(model, num_cells=256, num_sequences=2, max_batch=8, max_outputs=1, num_threads=1)


def test_an_abort_from_another_thread_ends_the_steps(contexts: Callable[..., LlamaContext]) -> None:
    context = contexts()
    stopper = threading.Thread(target=context.abort)
    with pytest.raises(EngineFailed, match="the step was aborted"):
        for number in range(100_000):
            if number == 3:
                stopper.start()
            compute(context, 0, 0, 200)
            context.clear()
    stopper.join()


# --- blocks


@pytest.mark.parametrize("kind", BLOCKS_KINDS)
def test_imported_blocks_give_the_logits_of_computed_ones(kind: str, contexts: Callable[..., LlamaContext]) -> None:
    source, target = contexts(kind), contexts(kind, num_cells=1024, num_sequences=40, max_batch=32, num_threads=2)
    compute(target, 3, 0, 50)
    for first in range(0, 128, 32):
        compute(source, 0, first, first + 32)
        target.import_block(7, first, 32, source.export_block(0, first, 32))
    assert compute(source, 0, 128, 129) == compute(target, 7, 128, 129)
    assert target.export_block(7, 32, 64) == source.export_block(0, 32, 64)
    assert source.export_block(0, 100, 29) == source.export_block(0, 100, 29)


@pytest.mark.parametrize("kind", BLOCKS_KINDS)
def test_a_pool_with_holes_gives_and_takes_the_same_blocks(kind: str, contexts: Callable[..., LlamaContext]) -> None:
    whole, holed = contexts(kind), contexts(kind, num_cells=256)
    expected = compute(whole, 0, 0, 64)
    compute(holed, 0, 0, 32)
    compute(holed, 1, 0, 223)
    for first in range(2, 222, 4):
        holed.remove(1, first, first + 1)
    for first in (28, 12, 0):  # cells that are found again in another order than they were given out
        holed.remove(0, first)
        compute(holed, 0, first, 32, chunk=5)
    assert compute(holed, 0, 32, 64, chunk=3) == expected
    block = whole.export_block(0, 0, 64)
    assert holed.export_block(0, 0, 64) == block
    holed.remove(0)
    holed.import_block(2, 0, 64, block)
    assert holed.export_block(2, 0, 64) == block


def test_an_import_takes_as_many_free_cells_as_it_has_tokens_and_leaves_none_taken_if_it_fails(
    contexts: Callable[..., LlamaContext],
) -> None:
    context = contexts(num_cells=256)
    compute(context, 0, 0, 256)
    block = context.export_block(0, 0, 16)
    for first in range(0, 150, 10):
        context.remove(0, first, first + 1)
    with pytest.raises(PoolFull, match="no room for a block of 16 tokens"):
        context.import_block(1, 0, 16, block)
    context.remove(0, 155, 156)
    context.import_block(1, 0, 16, block)
    assert context.export_block(1, 0, 16) == block
    assert not context.decode([5], [16], [1], [False])


def test_a_block_behind_a_sliding_window_whose_cells_were_reused_is_not_given_out(contexts: Callable[..., LlamaContext]) -> None:
    context = contexts("sliding-window", num_cells=256)
    compute(context, 0, 0, 10)
    compute(context, 1, 0, 246)
    context.remove(0)
    compute(context, 0, 0, 10)
    context.remove(1, 190)
    assert context.is_whole(1, 0, 64)
    compute(context, 0, 10, 60)
    assert not context.is_whole(1, 0, 64)
    with pytest.raises(BlockRefused, match="lacks some of 64 tokens from position 0"):
        context.export_block(1, 0, 64)


@pytest.mark.parametrize("kind", BLOCKS_KINDS)
def test_every_byte_that_is_not_kv_data_is_checked(kind: str, contexts: Callable[..., LlamaContext]) -> None:
    context = contexts(kind)
    compute(context, 0, 0, 20)
    form, block = context.block_format, context.export_block(0, 8, 4)
    assert form is not None and form == BlockFormat.learn(block, 4)
    data_bytes = sum(row_bytes * 4 for cache in form.caches for _, row_bytes in cache.rows)
    refused = [offset for offset in range(len(block)) if not fits(form, flipped(block, offset), 8, 4)]
    assert len(refused) == len(block) - data_bytes
    for offset in refused:
        with pytest.raises(BlockRefused, match=r"not one of 4 tokens from position 8: byte \d+"):
            context.import_block(1, 8, 4, flipped(block, offset))
    assert not context.is_whole(1, 8, 4)


def flipped(block: bytes, offset: int) -> bytes:
    changed = bytearray(block)
    changed[offset] ^= 1 << offset % 8
    return bytes(changed)


def fits(form: BlockFormat, payload: bytes | memoryview, first_position: int, num_tokens: int) -> bool:
    try:
        form.check(payload, first_position, num_tokens)
    except BlockRefused:
        return False
    return True


def test_blocks_of_other_lengths_positions_counts_and_models_are_refused(contexts: Callable[..., LlamaContext]) -> None:
    context, other = contexts(), contexts("sliding-window")
    compute(context, 0, 0, 20)
    compute(other, 0, 0, 20)
    form, block = context.block_format, context.export_block(0, 8, 4)
    assert form is not None and fits(form, block, 8, 4) and fits(form, memoryview(block), 8, 4)
    wrong = [(block[:size], 8, 4) for size in range(0, len(block), 3)]
    wrong += [(block + b"\0", 8, 4), (block * 2, 8, 4), (block, 7, 4), (block, 12, 4), (block, 8, 3), (block, 8, 5), (block, 0, 400)]
    wrong += [(other.export_block(0, 8, 4), 8, 4), (context.export_block(0, 8, 5), 8, 4)]
    assert not any(fits(form, *each) for each in wrong)


def test_what_is_not_a_block_of_a_known_form_is_not_learned(contexts: Callable[..., LlamaContext]) -> None:
    context = contexts()
    compute(context, 0, 0, 8)
    block = context.export_block(0, 0, 8)
    for changed, count in (
        (b"", 8),
        (block[:7], 8),
        (block[:-1], 8),
        (block + b"\0", 8),
        (block + block[8:100], 8),
        (b"\1" + block, 8),
        (block, 7),
    ):
        with pytest.raises(BlockRefused, match="a form that is not known here"):
            BlockFormat.learn(changed, count)


def test_a_layouts_fingerprint_is_equal_exactly_if_all_of_it_is(contexts: Callable[..., LlamaContext]) -> None:
    formats = [contexts(kind).block_format for kind in ("dense", "sliding-window")]

    def fingerprint(form: BlockFormat | None = formats[0], model: str = "m", build: str = "b", kv: str = "q8_0", size: int = 64) -> str:
        assert form is not None
        return layout_fingerprint(form, model_hash=model, build=build, type_k=kv, type_v=kv, flash_attention=True, block_size=size)

    assert fingerprint() == fingerprint(contexts("moe").block_format)  # the model's hash tells them apart
    found = [
        fingerprint(),
        fingerprint(formats[1]),
        fingerprint(model="n"),
        fingerprint(build="c"),
        fingerprint(kv="f16"),
        fingerprint(size=32),
    ]
    assert len(set(found)) == 6


def test_models_that_hand_nothing_over_say_why(contexts: Callable[..., LlamaContext], models: dict[str, LlamaModel]) -> None:
    for kind in ("hybrid", "recurrent"):
        assert "has recurrent layers, whose state cannot be cut into blocks" in probe(contexts(kind), models[kind])
    context = contexts("sliding-window")
    assert probe(context, models["sliding-window"], 80) == ""
    assert "sliding window of 80 tokens is shorter than a block of 81" in probe(context, models["sliding-window"], 81)
