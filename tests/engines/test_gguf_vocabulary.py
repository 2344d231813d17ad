"""A GGUF vocabulary as the files of a Hugging Face model: the same tokens, bytes and ends as llama.cpp has, or a reason why not."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.engines.tokenizers import Tokenizer, load_tokenizer
from meshserve.engines.tokenizers.gguf import read_gguf, zero_tensor_file
from meshserve.engines.tokenizers.gguf_pretokenizers import ALIASES, SPLITS
from meshserve.engines.tokenizers.gguf_vocabulary import tokenizer_files
from meshserve.engines.tokenizers.settings import TextSettings
from meshserve.errors import TokenizerFailed
from tests.engines.gguf_harness import (
    CONTROL,
    LETTERS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    LlamaVocabulary,
    all_characters,
    byte_level,
    corpus,
    sentence_piece,
    write_vocabulary,
)

SPECIAL = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<unk>": UNKNOWN, "<|user|>": USER_DEFINED, "<think>": USER_DEFINED}
SOURCES = [path.read_text() for path in sorted((Path(__file__).parents[2] / "meshserve").rglob("*.py"))]
VARIANTS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "no prefix": {"add_space_prefix": False},
    "eos": {"add_bos_token": False, "add_eos_token": True},
}


class Pair:
    """A vocabulary twice: as llama.cpp has it, and as the files that are made of it do."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = tokenizer_files(read_gguf(path).metadata)
        self.ours: Tokenizer = load_tokenizer("huggingface", self.files)
        self.theirs = LlamaVocabulary(path)

    def check_text(self, text: str) -> None:
        for adds_special in (False, True):
            assert list(self.ours.encode(text, adds_special)) == self.theirs.encode(text, adds_special), text[:200]

    def check_vocabulary(self) -> None:
        assert self.ours.vocab_size == self.theirs.size
        assert set(self.ours.eos_tokens) == self.theirs.ends
        for token in range(self.theirs.size):
            assert self.ours.token_bytes(token) == self.theirs.piece(token)


USUAL_SPLITS = ("default", "llama-bpe", "qwen2", "smollm")
"""Those of most models; the others take two minutes, and change with the library only."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in USUAL_SPLITS else pytest.mark.full) for name in sorted(SPLITS)],
)
def split(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    metadata = byte_level(request.param, SPECIAL, add_bos_token=True)
    size = len(metadata["tokenizer.ggml.tokens"])
    ids = {"tokenizer.ggml.bos_token_id": size - 5, "tokenizer.ggml.eos_token_id": size - 4}
    return Pair(write_vocabulary(tmp_path_factory.mktemp("split") / "v.gguf", metadata | ids))


@pytest.fixture(scope="module")
def lacking(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """No tokens for two control characters and for the first byte of some letters."""
    metadata = byte_level("smollm", SPECIAL, bos_token_id=1, eos_token_id=2)
    lost = [LETTERS[value] for value in (0x04, 0x14, 0xC5)]
    kept = [not any(letter in token for letter in lost) for token in metadata["tokenizer.ggml.tokens"]]
    for key in ("tokens", "token_type"):
        metadata[f"tokenizer.ggml.{key}"] = [each for each, is_kept in zip(metadata[f"tokenizer.ggml.{key}"], kept, strict=True) if is_kept]
    merges = metadata["tokenizer.ggml.merges"]
    metadata["tokenizer.ggml.merges"] = [merge for merge in merges if not any(letter in merge for letter in lost)]
    return Pair(write_vocabulary(tmp_path_factory.mktemp("lacking") / "v.gguf", metadata))


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def pieces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    texts = [*SOURCES[:60], *(text.encode("utf-8", "replace").decode() for text in corpus(num_mixed=50))]
    metadata = sentence_piece(texts, 3000, {**SPECIAL, "[PAD]": UNUSED}, **VARIANTS[request.param])
    return Pair(write_vocabulary(tmp_path_factory.mktemp("pieces") / "v.gguf", metadata))


@pytest.fixture(scope="module")
def smollm2() -> Pair:
    named = os.environ.get("MESHSERVE_TEST_GGUF")
    cached = sorted((Path.home() / ".cache" / "meshserve" / "models").rglob("SmolLM2*.gguf"))
    found = [Path(named)] if named else cached
    if not found or not found[0].is_file():
        pytest.skip("no real model here; name one in MESHSERVE_TEST_GGUF")
    return Pair(found[0])


def test_byte_level_vocabularies_split_texts_as_the_library_does(split: Pair) -> None:
    for text in corpus():
        split.check_text(text)
    split.check_vocabulary()


@pytest.mark.full
def test_byte_level_vocabularies_know_every_character_as_the_library_does(split: Pair) -> None:
    for text in all_characters():
        assert list(split.ours.encode(text)) == split.theirs.encode(text, True)


def test_vocabularies_of_scores_join_pieces_as_the_library_does(pieces: Pair) -> None:
    for text in corpus():
        pieces.check_text(text)
    pieces.check_vocabulary()


@given(text=st.text(alphabet="ab ,.'1\x04\x14éń\n", max_size=40))
def test_bytes_without_a_token_are_left_out_and_keep_apart_what_is_around_them(lacking: Pair, text: str) -> None:
    lacking.check_text(text)


@given(text=st.text(max_size=60))
def test_any_text_makes_the_same_tokens(split: Pair, text: str) -> None:
    split.check_text(text)


@given(text=st.text(max_size=60) | st.text(alphabet="ab ▁\n<>|", max_size=60))
def test_any_text_makes_the_same_pieces(pieces: Pair, text: str) -> None:
    pieces.check_text(text)


def test_a_real_model_converts_exactly(smollm2: Pair) -> None:
    for text in corpus():
        smollm2.check_text(text)
    smollm2.check_vocabulary()
    assert TextSettings.of_files(smollm2.files).template(False)


@given(text=st.text())
def test_a_real_model_makes_the_same_tokens_of_any_text(smollm2: Pair, text: str) -> None:
    smollm2.check_text(text)


def test_a_file_without_tensors_has_the_vocabulary(smollm2: Pair, tmp_path: Path) -> None:
    path = tmp_path / "zero.gguf"
    path.write_bytes(zero_tensor_file(smollm2.path))
    small = LlamaVocabulary(path)
    assert small.size == smollm2.theirs.size and small.ends == smollm2.theirs.ends
    assert all(small.encode(text) == smollm2.theirs.encode(text) for text in corpus(num_mixed=50))


def test_a_conversion_takes_less_than_two_seconds_of_processor_time(smollm2: Pair) -> None:
    begun_s = time.process_time()
    tokenizer_files(read_gguf(smollm2.path).metadata)
    assert time.process_time() - begun_s < 2.0


@pytest.mark.full
def test_every_name_of_a_split_is_one_that_the_library_knows(tmp_path: Path) -> None:
    texts = ("1234 Ab'S  x\n\n !?\r\n", "'s 12345~", "  <|user|>")
    small = {
        **byte_level("gpt-2", SPECIAL, "".join(sorted(set("".join(texts))))),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
    for name in ALIASES:
        path = write_vocabulary(tmp_path / "v.gguf", {**small, "tokenizer.ggml.pre": name})
        pair = Pair(path)
        for text in texts:
            assert (name, list(pair.ours.encode(text))) == (name, pair.theirs.encode(text, True))
        pair.theirs.close()


def test_settings_and_the_template_go_into_the_files_beside(tmp_path: Path) -> None:
    metadata = {
        **byte_level("gpt-2", SPECIAL, bos_token_id=1, eos_token_id=2, eot_token_id=3),
        "tokenizer.chat_template": "{{ messages }}",
        "general.sampling.temp": 0.25,
        "general.sampling.top_k": 20,
    }
    files = tokenizer_files(read_gguf(write_vocabulary(tmp_path / "v.gguf", metadata)).metadata)
    assert files["chat_template.jinja"] == b"{{ messages }}"
    generation = json.loads(files["generation_config.json"])
    assert generation["temperature"] == 0.25 and generation["top_k"] == 20 and generation["eos_token_id"][:2] == [2, 3]


def refusal(metadata: Mapping[str, Any], **more: Any) -> str:
    with pytest.raises(TokenizerFailed) as caught:
        tokenizer_files({**metadata, **{f"tokenizer.ggml.{key}": value for key, value in more.items()}})
    assert "\n" not in caught.value.message
    return caught.value.message


def test_what_cannot_be_exact_is_refused_with_the_reason() -> None:
    metadata = byte_level("gpt-2", SPECIAL)
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert "'bert'" in refusal(metadata, model="bert")
    assert "'kimi-k2'" in refusal(metadata, pre="kimi-k2")
    assert "missing or damaged" in refusal({}) and "missing or damaged" in refusal(metadata, tokens=[*tokens, tokens[0]])
    assert "makes no token" in refusal(metadata, merges=["a bc"])
    overlapping = {"tokens": [*tokens, "<a>b", ">bcdef"], "token_type": [*kinds, CONTROL, CONTROL]}
    lacking = [token for token in tokens if "Ā" not in token]
    assert "some single bytes" in refusal(metadata, pre="llama-bpe", tokens=lacking, token_type=[NORMAL] * len(lacking), merges=[])
    assert "overlap" in refusal(metadata, **overlapping)
    assert "stands for itself" in refusal(metadata, tokens=[*tokens, "é!é"], token_type=[*kinds, USER_DEFINED])
    assert "Phi-3" in refusal({**metadata, "general.name": "Phi-3 mini"})
    pieces = [f"<0x{value:02X}>" for value in range(256)]
    spm = {"model": "llama", "tokens": [*pieces, "a", "b", "ab", "ba"], "token_type": [6] * 256 + [NORMAL] * 4}
    assert "no scores" in refusal({}, **spm)
    assert "one score overlap" in refusal({}, **spm, scores=[0.0] * 260)


def test_a_vocabulary_that_would_take_for_ever_or_is_no_vocabulary_is_refused_at_once() -> None:
    pieces = [f"<0x{value:02X}>" for value in range(256)]
    begun_s = time.process_time()
    runs = ["x" * length for length in range(1, 257)]
    for special, words in ((["x" * 4000], "longer than 256 characters"), (runs, "too many of the special tokens overlap")):
        tokens = [*pieces, *special]
        kinds = [6] * 256 + [CONTROL] * len(special)
        assert words in refusal({}, model="llama", tokens=tokens, token_type=kinds, scores=[-float(token) for token in range(len(tokens))])
    assert "longer than 16,384 characters" in refusal({}, model="llama", tokens=["x" * 20_000])
    for wrong in ({"tokens": 7}, {"tokens": [7]}, {"token_type": 7}, {"merges": 7}, {"merges": [7]}):
        assert "damaged or unusual" in refusal(byte_level("gpt-2", SPECIAL), **wrong)
    assert time.process_time() - begun_s < 10.0
