"""Tokenizers of Hugging Face models against their library: every token's bytes, special tokens, and what their files say."""

import json
import sys
from array import array
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from meshserve.engines.dummy import DummyEngine
from meshserve.engines.dummy.vocabulary import map_vocabulary
from meshserve.engines.protocol import EngineOptions
from meshserve.engines.tokenizers import EOS_TOKEN, ByteTokenizer, load_tokenizer
from meshserve.engines.tokenizers.huggingface import HuggingFaceTokenizer
from meshserve.engines.tokenizers.pieces import piece_reader
from meshserve.engines.tokenizers.settings import TextSettings
from meshserve.engines.tokenizers.table import TokenTable
from meshserve.errors import TokenizerFailed, UsageError
from meshserve.roles.processor.detokenizing import Detokenizer
from meshserve.wire.generation import SamplingDefaults
from tests.engines.trained import KINDS, files_of, with_config, write_directory
from tests.harness import run_command

TEXT = st.text(max_size=60) | st.text("abc ,.'\n\t🙂é́ñ日本語▁#<>", max_size=60)


@lru_cache
def mine(kind: str) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(files_of(kind))


@lru_cache
def theirs(kind: str) -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer.from_str(files_of(kind)["tokenizer.json"].decode())
    found.no_truncation()
    return found


@pytest.fixture(scope="module", autouse=True)
def trained() -> None:
    """Train before the first property is timed."""
    for kind in KINDS:
        mine(kind)
        theirs(kind)


def streamed(kind: str, tokens: list[int], draw: st.DataObject) -> str:
    """In any split."""
    detokenizer = Detokenizer(mine(kind).token_bytes)
    texts, rest = [], tokens
    while rest:
        size = draw.draw(st.integers(1, len(rest)))
        texts.append(detokenizer.feed(rest[:size]))
        rest = rest[size:]
    return "".join([*texts, detokenizer.finish()])


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT, draw=st.data())
def test_a_text_streamed_in_any_split_is_what_the_library_decodes(kind: str, text: str, draw: st.DataObject) -> None:
    text = text.encode("utf-8", "replace").decode()
    tokens = mine(kind).encode(text, add_special_tokens=False)
    assert list(tokens) == theirs(kind).encode(text, add_special_tokens=False).ids
    before = theirs(kind).encode("so", add_special_tokens=False).ids
    whole = theirs(kind).decode([*before, *tokens])
    assert whole == theirs(kind).decode(before) + streamed(kind, list(tokens), draw)
    assert mine(kind).decode(tokens) == theirs(kind).decode(list(tokens))


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "word-piece"])
@given(draw=st.data())
def test_any_tokens_streamed_in_any_split_are_what_the_library_decodes(kind: str, draw: st.DataObject) -> None:
    """Bytes that are no text included: both replace them alike."""
    tokens = draw.draw(st.lists(st.integers(0, mine(kind).vocab_size + 3), max_size=30))
    known = [token for token in tokens if token < mine(kind).vocab_size]
    before = theirs(kind).encode("so", add_special_tokens=False).ids
    assert theirs(kind).decode([*before, *known]) == theirs(kind).decode(before) + streamed(kind, tokens, draw)


@given(st.lists(st.integers(0, 800), max_size=30), st.data())
def test_any_tokens_with_byte_fallback_are_their_bytes_joined(tokens: list[int], draw: st.DataObject) -> None:
    """The library replaces each byte of a malformed row by itself, so there only well-formed ones compare."""
    tokenizer = mine("byte-fallback")
    joined = b"".join(map(tokenizer.token_bytes, tokens))
    text = streamed("byte-fallback", tokens, draw)
    assert text == joined.decode("utf-8", "replace")
    if "\ufffd" not in text:
        known = [token for token in tokens if token < tokenizer.vocab_size]
        before = theirs("byte-fallback").encode("so", add_special_tokens=False).ids
        assert theirs("byte-fallback").decode([*before, *known]) == "so" + text


@given(st.binary(max_size=40), st.data())
def test_any_bytes_as_byte_level_tokens_come_back(data: bytes, draw: st.DataObject) -> None:
    single = {mine("byte-level").token_bytes(token): token for token in range(mine("byte-level").vocab_size)}
    tokens = [single[bytes([value])] for value in data]
    assert streamed("byte-level", tokens, draw) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_are_not_cut_and_special_tokens_stand_for_nothing(kind: str) -> None:
    tokenizer = mine(kind)
    assert len(tokenizer.encode("many words of a text " * 20)) > 80
    assert tokenizer.eos_token == 2 and tokenizer.eos_tokens == (2,)
    assert [tokenizer.token_bytes(token) for token in (0, 1, 2, 3, 4, tokenizer.vocab_size, 10**9, -1)] == [b""] * 8
    assert list(tokenizer.encode("<|user|>", add_special_tokens=False)) == [3]
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a?b")


def test_the_beginning_of_sequence_is_added_as_the_files_say_and_never_to_a_rendered_chat() -> None:
    for kind, config, begins in (
        ("byte-fallback", {}, True),
        ("byte-fallback", {"add_bos_token": True}, True),
        ("byte-fallback", {"add_bos_token": False}, False),
        ("byte-level", {}, False),
        ("byte-level", {"add_bos_token": True}, True),
    ):
        tokenizer = HuggingFaceTokenizer(with_config(kind, **config))
        without = tokenizer.encode("words", add_special_tokens=False)
        assert list(tokenizer.encode("words")) == [1] * begins + list(without)
        assert list(tokenizer.encode("<s>words", add_special_tokens=False)).count(1) == 1


def test_a_table_says_the_same_wherever_it_was_sent() -> None:
    for vocabulary in (mine("byte-level"), ByteTokenizer()):
        table = TokenTable.from_bytes(TokenTable.of(vocabulary).to_bytes())
        assert (table.vocab_size, table.eos_tokens, table.eos_token) == (vocabulary.vocab_size, vocabulary.eos_tokens, vocabulary.eos_token)
        assert all(table.token_bytes(token) == vocabulary.token_bytes(token) for token in range(-1, vocabulary.vocab_size + 2))


@given(st.binary(max_size=60))
def test_what_is_no_table_is_refused(data: bytes) -> None:
    whole = mine("word-piece").table.to_bytes()
    for bad in (data, whole[:-1], whole + data + b"x"):
        with pytest.raises(TokenizerFailed):
            TokenTable.from_bytes(bad)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.json": b"{"},
        {"tokenizer.json": b"[]"},
        {"tokenizer.json": b"\xff" * 100},
        {**files_of("byte-level"), "tokenizer_config.json": b"[" * 100_000},
        {**files_of("byte-level"), "tokenizer_config.json": b"7"},
        {**files_of("byte-level"), "generation_config.json": b"nan"},
        with_config("byte-level", eos_token=None)
        | {"tokenizer.json": files_of("byte-level")["tokenizer.json"].replace(b'"</s>"', b'"<bye>"')},
    ],
)
def test_files_that_will_not_do_are_refused_in_one_sentence(files: dict[str, bytes]) -> None:
    with pytest.raises(TokenizerFailed) as caught:
        load_tokenizer("huggingface", files)
    assert "\n" not in caught.value.message


def test_a_token_id_beyond_all_vocabularies_gets_no_table() -> None:
    state = json.loads(files_of("byte-level")["tokenizer.json"])
    state["model"]["vocab"]["huge"] = 2**31
    with pytest.raises(TokenizerFailed, match="token ids up to 2147483648"):
        HuggingFaceTokenizer({"tokenizer.json": json.dumps(state).encode()})


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "CTC"},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}]},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "ab"}, "content": ""}]},
        7,
    ],
)
def test_a_decoder_that_looks_beyond_one_token_is_refused(decoder: object) -> None:
    with pytest.raises(ValueError, match=r"decoder"):
        piece_reader(decoder)


def test_settings_come_from_all_the_files() -> None:
    files = {
        "tokenizer_config.json": json.dumps(
            {
                "chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}, {"name": 1}, "x"],
                "bos_token": {"content": "<b>"},
                "eos_token": "<e>",
                "pad_token": None,
                "add_bos_token": "yes",
            }
        ).encode(),
        "generation_config.json": b'{"eos_token_id": [7, 8, true, -1], "temperature": 0.6}',
    }
    settings = TextSettings.of_files(files)
    assert (settings.template(False), settings.template(True)) == ("D", "T")
    assert settings.special_tokens == {"bos_token": "<b>", "eos_token": "<e>"} and settings.add_bos_token is None
    assert settings.eos_ids == (7, 8) and settings.sampling_defaults == SamplingDefaults(temperature=0.6)
    assert TextSettings.of_files({**files, "chat_template.jinja": b"J"}).template(False) == "J"
    assert TextSettings.of_files({}).template(True) is None


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ({}, SamplingDefaults()),
        ({"temperature": 1, "top_k": 40}, SamplingDefaults(1.0, top_k=40)),
        (
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1},
            SamplingDefaults(0.7, 0.8, 20, 0.05, 1.1),
        ),
        ({"do_sample": False, "temperature": 0.6, "top_k": 5, "min_p": 0.5}, SamplingDefaults()),
        ({"do_sample": False, "repetition_penalty": 1.2}, SamplingDefaults(repetition_penalty=1.2)),
        ({"temperature": -1, "top_p": 0, "top_k": -1, "min_p": 2, "repetition_penalty": 0}, SamplingDefaults()),
        ({"temperature": "hot", "top_p": None, "top_k": True, "min_p": [0.1], "repetition_penalty": {}}, SamplingDefaults()),
        ({"temperature": 101, "top_p": 1e999, "top_k": 40.0, "min_p": 1e999}, SamplingDefaults(top_k=40)),
    ],
)
def test_sampling_defaults_are_what_a_sampler_can_use_of_the_generation_config(said: dict[str, Any], read: SamplingDefaults) -> None:
    assert TextSettings.of_files({"generation_config.json": json.dumps(said).encode()}).sampling_defaults == read


@pytest.mark.parametrize("kind", KINDS)
def test_the_dummy_model_writes_in_any_vocabulary_token_for_token(kind: str) -> None:
    tokenizer = mine(kind)
    mapped = map_vocabulary(tokenizer)
    assert mapped.from_own[EOS_TOKEN] == tokenizer.eos_token and mapped.to_own(tokenizer.eos_token) == EOS_TOKEN
    words = [mapped.from_own[token] for token in range(257, ByteTokenizer.vocab_size)]
    assert all(tokenizer.token_bytes(token) for token in words), "every word is one that can be read"
    pieces = {tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)}
    assert mapped.can_write_ascii == all(bytes([value]) in pieces for value in range(0x20, 0x7F))
    assert mapped.can_write_ascii or kind not in ("byte-level", "byte-fallback")
    assert {*mapped.from_own} == set(range(tokenizer.vocab_size))
    assert all(mapped.from_own[mapped.to_own(token)] == token for token in range(tokenizer.vocab_size))
    assert mapped.to_own(tokenizer.vocab_size) >= mapped.own_size


def test_a_directory_makes_the_card_and_the_model_hash(tmp_path: Path) -> None:
    root = tmp_path
    one = write_directory(root / "one", files_of("byte-level"))
    same = write_directory(root / "same", files_of("byte-level"))
    other = write_directory(root / "other", with_config("byte-level", chat_template="another"))
    engines = [DummyEngine(EngineOptions("m", {"tokenizer": str(path)})) for path in (one, same, other)]
    cards = [engine.card for engine in engines]
    assert cards[0] == cards[1] != cards[2] and cards[0].model_hash != cards[2].model_hash
    assert cards[0].tokenizer == "huggingface" and [file.name for file in cards[0].files] == ["tokenizer.json", "tokenizer_config.json"]
    assert {file.sha256: file.size_bytes for file in cards[0].files} == {key: len(data) for key, data in engines[0].files.items()}
    (one / "tokenizer.json").write_bytes(b"{")
    for bad, words in ((str(one), "cannot be used"), (str(root), "no tokenizer.json"), (str(root / "none"), "directory with a")):
        with pytest.raises(UsageError, match=words):
            DummyEngine(EngineOptions("m", {"tokenizer": bad}))


def test_tokens_of_a_prompt_are_of_the_array_type_that_travels() -> None:
    assert isinstance(mine("byte-level").encode("x"), array) and mine("byte-level").encode("x").typecode == "I"


def test_who_needs_no_such_tokenizer_loads_neither_its_library_nor_jinja() -> None:
    code = "import sys, meshserve.app, meshserve.engines.dummy; print(sorted({'tokenizers', 'jinja2'} & sys.modules.keys()))"
    found = run_command([sys.executable, "-c", code], 20.0)
    assert (found.exit_code, found.stdout.strip()) == (0, "[]"), found


def test_special_tokens_are_no_text_but_those_that_mark_calls_and_reasoning_are() -> None:
    made = tokenizers.Tokenizer.from_str(files_of("metaspace")["tokenizer.json"].decode())
    made.add_special_tokens(["[TOOL_CALLS]", "<think>", "<|other|>"])
    found = HuggingFaceTokenizer({**files_of("metaspace"), "tokenizer.json": made.to_str().encode()})
    shown = [found.token_bytes(made.token_to_id(piece) or 0) for piece in ("[TOOL_CALLS]", "<think>", "<|other|>")]
    assert shown == [b"[TOOL_CALLS]", b"<think>", b""]


def test_a_kind_is_found_by_name_and_an_unknown_one_says_what_is_missing() -> None:
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)
    assert isinstance(load_tokenizer("huggingface", files_of("byte-level")), HuggingFaceTokenizer)
    with pytest.raises(TokenizerFailed, match="'mine' is unknown here; install the package of the model's engine"):
        load_tokenizer("mine")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("tests.engines.no_such_module:Tokenizer", "needs the package 'tests.engines.no_such_module'"),
        ("tests.engines.trained:no_such_name", "cannot be loaded"),
        ("meshserve.engines.tokenizers.own:byte_tokenizer", ""),
    ],
)
def test_another_package_may_bring_a_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, words: str) -> None:
    write_directory(tmp_path / "other-1.dist-info", {"METADATA": b"Name: other\nVersion: 1\n"})
    (tmp_path / "other-1.dist-info" / "entry_points.txt").write_text(f"[meshserve.tokenizers]\nother = {value}\n")
    monkeypatch.syspath_prepend(tmp_path)
    if not words:
        assert isinstance(load_tokenizer("other"), ByteTokenizer)
        return
    with pytest.raises(TokenizerFailed, match=words):
        load_tokenizer("other")
