"""Headers of GGUF files: what is read of them, and what is said of those that will not do."""

import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.engines.tokenizers.gguf import model_hash, read_gguf, zero_tensor_file
from meshserve.errors import StartupFailed

gguf = pytest.importorskip("gguf")
numpy = pytest.importorskip("numpy")

TOKENS = ["<s>", "", "ü", "a" * 300]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf")


def write_model(path: Path, **more: Any) -> Path:
    """Values of all kinds, and two tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_context_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv([2, 0, 1])
    writer.add_chat_template("{{ messages }}")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.5, -1.0, 0.0, 2.0])
    writer.add_bool("a.truth", True)
    writer.add_float64("a.number", -0.25)
    writer.add_int64("a.negative", -(2**40))
    writer.add_array("a.truths", [True, False])
    for key, value in more.items():
        writer.add_uint32(key.replace("__", "."), value)
    writer.add_tensor("one", numpy.arange(64, dtype=numpy.float32))
    writer.add_tensor("two", numpy.zeros((2, 34), dtype=numpy.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_header_says_what_was_written(model: Path) -> None:
    found = read_gguf(model)
    assert (found.version, found.architecture, found.context_length, found.num_layers) == (3, "llama", 128, 3)
    assert found.kv_heads == (2, 0, 1) and found.chat_template == "{{ messages }}" and found.number("unknown") == 0
    tokens = found.metadata["tokenizer.ggml.tokens"]
    assert list(tokens) == TOKENS and len(tokens) == 4 and [tokens[0], tokens[-1], tokens[1:3]] == [TOKENS[0], TOKENS[-1], TOKENS[1:3]]
    assert list(found.metadata["tokenizer.ggml.scores"]) == [0.5, -1.0, 0.0, 2.0]
    assert (found.metadata["a.truth"], found.metadata["a.number"], found.metadata["a.negative"]) == (True, -0.25, -(2**40))
    assert list(found.metadata["a.truths"]) == [1, 0]
    assert found.num_tensors == 2 and found.data_bytes == 64 * 4 + 68


def test_one_number_of_kv_heads_is_that_of_all_layers_and_none_that_of_the_queries(tmp_path: Path) -> None:
    assert read_gguf(write_plain(tmp_path / "a.gguf", {"head_count": 6, "head_count_kv": 2})).kv_heads == (2, 2)
    assert read_gguf(write_plain(tmp_path / "b.gguf", {"head_count": 6})).kv_heads == (6, 6)


def write_plain(path: Path, heads: dict[str, int]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    for key, value in heads.items():
        writer.add_uint32(f"llama.attention.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_every_byte_that_is_missing_is_noticed_in_one_sentence(model: Path) -> None:
    whole = model.read_bytes()
    for length in [*range(0, len(whole) - 40, 7), len(whole) - 29]:
        model.write_bytes(whole[:length])
        with pytest.raises(StartupFailed) as caught:
            read_gguf(model)
        assert "\n" not in caught.value.message and ("download it again" in caught.value.message or length < 24)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "is not a GGUF file"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "has version 1 of the format; convert"),
        (struct.pack("<4sIQQ", b"GGUF", 4, 0, 0), "has version 4 of the format; convert"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**63), "damaged; download it again"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**63, 0), "damaged; download it again"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**62) + bytes(64), "damaged; download it again"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 2**61) + bytes(64), "damaged; download it again"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 10, 2**61) + bytes(64), "damaged; download it again"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 9, 1) + bytes(64), "damaged; download it again"),
        (struct.pack("<4sIQQQ1sIIQQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 1, 2**64 - 1) + bytes(64), "damaged; download it again"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"k", 99) + bytes(64), "damaged; download it again"),
    ],
)
def test_what_is_no_model_is_refused_with_what_to_do(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(StartupFailed, match=words):
        read_gguf(path)


def test_a_path_that_is_no_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StartupFailed, match="there is no file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(StartupFailed, match=r"is a directory; name the \.gguf file in it"):
        read_gguf(tmp_path)
    with pytest.raises(StartupFailed, match="cannot be read"):
        model_hash([tmp_path / "none.gguf"])


def test_a_model_in_several_files_is_read_from_its_first_one(tmp_path: Path) -> None:
    parts = [write_model(tmp_path / f"big-0000{number}-of-00003.gguf", split__count=3, split__no=number - 1) for number in (1, 2, 3)]
    found = read_gguf(parts[0])
    assert found.parts == tuple(parts)
    assert model_hash(found.parts) != model_hash(parts[:2])
    with pytest.raises(StartupFailed, match=r"00002-of-00003\.gguf is not the first of 3 parts; name .*big-00001-of-00003\.gguf"):
        read_gguf(parts[1])
    parts[2].write_bytes(parts[2].read_bytes()[:-40])
    with pytest.raises(StartupFailed, match=r"00003-of-00003\.gguf .*download it again"):
        read_gguf(parts[0])
    parts[2].unlink()
    with pytest.raises(StartupFailed, match=r"there is no file .*00003-of-00003\.gguf"):
        read_gguf(parts[0])
    with pytest.raises(StartupFailed, match=r"one of 3 parts, .*: call the first alone-00001-of-00003"):
        read_gguf(write_model(tmp_path / "alone.gguf", split__count=3))


def test_senseless_numbers_of_parts_and_alignments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupFailed, match="damaged"):
        read_gguf(write_model(tmp_path / "parts.gguf", split__count=1 << 31))
    path = write_model(tmp_path / "odd.gguf", a__alignment=0)
    path.write_bytes(path.read_bytes().replace(b"\x0b\0\0\0\0\0\0\0a.alignment", b"\x11\0\0\0\0\0\0\0general.alignment", 1))
    with pytest.raises(StartupFailed, match="damaged"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("llama.block_count", gguf.GGUFValueType.UINT32, 2**32 - 1),
        ("llama.block_count", gguf.GGUFValueType.UINT64, 2**64 - 1),
        ("llama.context_length", gguf.GGUFValueType.UINT32, 2**32 - 1),
        ("llama.context_length", gguf.GGUFValueType.UINT32, 0),
        ("llama.attention.head_count_kv", gguf.GGUFValueType.STRING, "two"),
        ("llama.attention.head_count_kv", gguf.GGUFValueType.FLOAT32, float("nan")),
        ("llama.attention.head_count_kv", gguf.GGUFValueType.ARRAY, ["two"]),
        ("llama.attention.head_count_kv", gguf.GGUFValueType.ARRAY, [float("nan")]),
        ("llama.attention.head_count_kv", gguf.GGUFValueType.ARRAY, [-7, 1]),
        ("split.count", gguf.GGUFValueType.STRING, "two"),
        ("tokenizer.ggml.tokens", gguf.GGUFValueType.UINT32, 7),
        ("tokenizer.ggml.tokens", gguf.GGUFValueType.ARRAY, [7, 8]),
        ("tokenizer.ggml.token_type", gguf.GGUFValueType.UINT32, 7),
        ("tokenizer.ggml.scores", gguf.GGUFValueType.UINT32, 7),
        ("tokenizer.ggml.merges", gguf.GGUFValueType.ARRAY, [7, 8]),
        ("tokenizer.ggml.add_bos_token", gguf.GGUFValueType.STRING, "yes"),
    ],
)
def test_a_known_key_of_another_kind_or_beyond_reason_is_named(tmp_path: Path, key: str, kind: Any, value: Any) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_key_value(key, value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(StartupFailed, match=f"is damaged or unusual: {key!r} is not .*; download it again"):
        read_gguf(tmp_path / "m.gguf")


@given(st.data())
def test_no_damage_to_a_header_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    whole = bytearray(write_plain(path, {"head_count": 6}).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        read_gguf(path)
    except StartupFailed as error:
        assert "\n" not in error.message


def test_the_hash_is_of_the_contents(model: Path, tmp_path: Path) -> None:
    same = tmp_path / "same"
    same.write_bytes(model.read_bytes())
    os.utime(same, (1, 1))
    assert model_hash([model]) == model_hash([same]) and len(model_hash([model])) == 32
    same.write_bytes(model.read_bytes()[:-1] + b"x")
    assert model_hash([model]) != model_hash([same])


def test_a_file_without_tensors_keeps_all_metadata(model: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.gguf"
    small.write_bytes(zero_tensor_file(model))
    found, whole = read_gguf(small), read_gguf(model)
    assert found.num_tensors == 0 and found.data_bytes == 0 and small.stat().st_size % 32 == 0
    assert list(found.metadata) == list(whole.metadata)
    assert list(found.metadata["tokenizer.ggml.tokens"]) == TOKENS and found.kv_heads == whole.kv_heads
