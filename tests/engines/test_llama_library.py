"""llama.cpp's library and its models, as the llama engine loads them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("gguf")  # which the tiny models are made with

from meshserve.engines.llama.library import ContextParams, ModelParams, check_defaults, load_library
from meshserve.engines.llama.model import LlamaModel
from meshserve.errors import StartupFailed
from tests.engines.tiny_models import DENSE, VOCABULARY, write_file


@pytest.fixture(autouse=True)
def library_is_there(tiny_files: dict[str, Path]) -> None:
    """Skip these tests where the models cannot be made."""


def test_declarations_that_are_shifted_by_one_field_are_noticed() -> None:
    library = load_library()
    model, context = library.functions.llama_model_default_params(), library.functions.llama_context_default_params()
    check_defaults(library, model, context)
    for offset in range(0, len(bytes(context)) - 32, 4):  # behind it are null pointers only
        shifted = bytes(context)[:offset] + bytes([7, 0, 0, 0]) + bytes(context)[offset:-4]
        with pytest.raises(StartupFailed, match="is not the build that was declared"):
            check_defaults(library, model, ContextParams.from_buffer_copy(shifted))
    for offset in range(0, 72, 4):
        shifted = bytes(model)[:offset] + bytes([7, 0, 0, 0]) + bytes(model)[offset:-4]
        with pytest.raises(StartupFailed, match="is not the build that was declared"):
            check_defaults(library, ModelParams.from_buffer_copy(shifted), context)


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


def test_a_model_says_what_it_is(tiny_models: dict[str, LlamaModel]) -> None:
    model = tiny_models["dense"]
    assert (model.architecture, model.vocabulary_size, model.end_tokens()) == ("llama", VOCABULARY, [2, 4])
    assert (model.metadata("general.name"), model.metadata("general.nothing")) == ("tiny llama", "")
    assert [kind for kind, found in tiny_models.items() if found.has_state] == ["hybrid", "recurrent"]
    assert tiny_models["sliding-window"].sliding_window == 80


@given(st.text(st.characters(exclude_characters="▁"), max_size=300))  # the vocabulary writes a space so
def test_pieces_of_a_texts_tokens_are_the_text(tiny_models: dict[str, LlamaModel], text: str) -> None:
    model = tiny_models["dense"]
    pieces = model.text_pieces()
    assert b"".join(pieces[token] for token in model.tokenize(text)) == text.encode("utf-8", "replace")


def test_what_looks_like_a_control_token_is_text(tiny_models: dict[str, LlamaModel]) -> None:
    model = tiny_models["dense"]
    assert 4 not in model.tokenize("<|im_end|>") and model.text_pieces()[4] == b""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[: len(data) // 2], r"refuses it \(.*\): use another file"),
        (lambda data: data.replace(b"llama", b"lxama"), r"does not know \(unknown model architecture: 'lxama'\): use another model"),
        (lambda data: data[:4] + b"\x63" + data[5:], r"refuses it \(.* version 99 .*\): use another file"),
    ],
)
def test_files_that_are_no_usable_models_are_refused_in_one_line(
    tiny_files: dict[str, Path], tmp_path: Path, change: Callable[[bytes], bytes], words: str
) -> None:
    path = tmp_path / "changed.gguf"
    path.write_bytes(change(tiny_files["dense"].read_bytes()))
    with pytest.raises(StartupFailed, match=words) as raised:
        LlamaModel(path)
    assert str(path) in raised.value.message and "\n" not in raised.value.message


def test_what_is_no_file_or_no_generating_model_is_refused(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    write_file(tmp_path / "bare.gguf", DENSE, {})
    for path, words in [
        (tmp_path / "none", "cannot be loaded"),
        (tmp_path, "cannot be loaded"),
        (tmp_path / "bare.gguf", r"bare\.gguf cannot be loaded"),
        (tiny_files["embedding"], "an embedding model"),
    ]:
        with pytest.raises(StartupFailed, match=words):
            LlamaModel(path)
