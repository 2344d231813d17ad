"""GGUF files: header, metadata and tensor table, read and checked without any library (github.com/ggml-org/ggml, docs/gguf.md)."""

import mmap
import os
import struct
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, overload

import xxhash

from meshserve.engines.models.specs import PART
from meshserve.engines.tokenizers.gguf_values import fault_of
from meshserve.errors import StartupFailed

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_HEAD = struct.Struct("<4sIQQ")
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Struct format of each value type that is a number or a truth value."""
_MAX_STRING_BYTES, _MAX_DIMENSIONS, _MAX_ALIGNMENT = 1 << 26, 8, 1 << 16
_READ_BYTES = 1 << 22
_BYTES_OF_BLOCKS: dict[int, dict[int, int]] = {
    1: {0: 4, 1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2},
    32: {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 9: 40, 20: 18, 39: 17},
    64: {40: 36},
    128: {41: 18},
    256: dict(
        zip((*range(10, 20), 21, 22, 23, 29, 34, 35), (84, 110, 144, 176, 210, 292, 66, 74, 98, 50, 110, 82, 136, 56, 54, 66), strict=True)
    ),
}
"""By the elements of a block: the bytes of one, by tensor type."""
_TENSOR_TYPES = {kind: (block, size) for block, kinds in _BYTES_OF_BLOCKS.items() for kind, size in kinds.items()}
"""Elements and bytes of a block. A type that is not here counts as one byte: only its offset is checked."""


class Strings(Sequence[str]):
    """An array of strings as it stands in the file: decoded one by one when asked for, so that 100,000 tokens are two objects."""

    __slots__ = ("_data", "_ends")

    def __init__(self, data: bytes, ends: "array[int]") -> None:
        self._data, self._ends = data, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        end = self._ends[index]
        begin = self._ends[index - 1] if index % len(self) else 0
        return self._data[begin + 8 : end].decode("utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        begin = 0
        for end in self._ends:
            yield self._data[begin + 8 : end].decode("utf-8", "replace")
            begin = end


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What the header of a GGUF file says; of a model in several files, that of the first one."""

    path: Path
    parts: tuple[Path, ...]
    """All files of the model, in order."""
    version: int
    metadata: Mapping[str, Any]
    """Values by key: numbers, texts, `array` for rows of numbers, :class:`Strings` for rows of texts."""
    num_tensors: int
    metadata_bytes: int
    """Where the metadata ends."""
    data_bytes: int
    """Bytes that the tensors take."""

    @property
    def architecture(self) -> str:
        """Such as `llama`; it begins the names of the model's own keys."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def context_length(self) -> int:
        """Tokens that the model was trained for; 0 if the file does not say."""
        return self.number("context_length")

    @property
    def num_layers(self) -> int:
        """Blocks of the model, with and without attention."""
        return self.number("block_count")

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """KV heads of each layer; 0 for a layer without attention."""
        found = self.metadata.get(f"{self.architecture}.attention.head_count_kv", self.number("attention.head_count"))
        return tuple(found) if isinstance(found, array) else (int(found),) * self.num_layers

    def kv_values_per_token(self) -> int:
        """Numbers that the KV cache keeps of one token, in all layers. What a layer without attention keeps is not among them."""
        width = self.number("attention.key_length") + self.number("attention.value_length")
        if not width and self.number("attention.head_count"):
            width = 2 * self.number("embedding_length") // self.number("attention.head_count")
        return sum(self.kv_heads) * width

    @property
    def chat_template(self) -> str:
        """Jinja; empty if the model has none."""
        return str(self.metadata.get("tokenizer.chat_template", ""))

    def number(self, key: str) -> int:
        """The whole number under a key of this architecture, without its prefix; 0 if there is none."""
        found = self.metadata.get(f"{self.architecture}.{key}", 0)
        return found if isinstance(found, int) else 0


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a model's file, and those of the other files if it is the first of several.

    Raises StartupFailed, with what to do, if one is no GGUF file, or not a whole one, or missing.
    """
    found = _read_file(path)
    num_parts = found.metadata.get("split.count", 0)
    if num_parts <= 1:
        return found
    stem = PART.sub("", path.stem)
    parts = tuple(path.with_name(f"{stem}-{number:05}-of-{num_parts:05}{path.suffix}") for number in range(1, num_parts + 1))
    if path not in parts:
        raise StartupFailed(f"{path} is one of {num_parts} parts, and llama.cpp finds them by their names: call the first {parts[0].name}")
    if path != parts[0]:
        raise StartupFailed(f"{path} is not the first of {num_parts} parts; name {parts[0]}")
    for part in parts[1:]:
        _read_file(part)
    return replace(found, parts=parts)


def _read_file(path: Path) -> GgufFile:
    try:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes < _HEAD.size or file.read(4) != _MAGIC:
                raise StartupFailed(f"{path} is not a GGUF file; name a model in that format, usually called something.gguf")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(path, data)
    except FileNotFoundError as error:
        raise StartupFailed(f"there is no file {path}; check the path of the model") from error
    except IsADirectoryError as error:
        raise StartupFailed(f"{path} is a directory; name the .gguf file in it") from error
    except OSError as error:
        raise StartupFailed(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    except (_Short, struct.error) as error:
        raise StartupFailed(f"{path} ends within its header, or that is damaged; download it again") from error


def zero_tensor_file(path: Path) -> bytes:
    """The file's metadata as a GGUF file without tensors: all that a vocabulary needs. Raises StartupFailed as :func:`read_gguf`."""
    found = read_gguf(path)
    with path.open("rb") as file:
        data = file.read(found.metadata_bytes)
    _, version, _, num_pairs = _HEAD.unpack_from(data)
    return _HEAD.pack(_MAGIC, version, 0, num_pairs) + data[_HEAD.size :] + bytes(-len(data) % _alignment(found.metadata))


def model_hash(paths: Sequence[Path]) -> str:
    """Identifies the whole contents of a model's files: XXH3, 128 bits, as 32 hexadecimal digits. Takes as long as reading them.

    Against accidents, not against a forger. Raises StartupFailed if the file cannot be read.
    """
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_READ_BYTES))
    for path in paths:
        try:
            with path.open("rb", buffering=0) as file:
                while num_bytes := file.readinto(buffer):
                    digest.update(buffer[:num_bytes])
        except OSError as error:
            raise StartupFailed(f"{path} cannot be read: {error.strerror}; check its path and permissions") from error
    return str(digest.hexdigest())


class _Short(Exception):
    """A length in the header reaches beyond the file, or beyond reason."""


class _Reader:
    """A place in the file. Nothing is read, and no memory taken, beyond its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def unpack(self, form: str) -> Any:
        (found,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return found

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > len(self.data) - self.at:
            raise _Short
        found = self.data[self.at : self.at + num_bytes]
        self.at += num_bytes
        return found

    def string(self) -> str:
        if (length := self.unpack("Q")) > _MAX_STRING_BYTES:
            raise _Short
        return self.take(length).decode("utf-8", "replace")

    def count(self, least_bytes: int) -> int:
        """A number of things that take so many bytes each at least."""
        if (found := self.unpack("Q")) * least_bytes > len(self.data) - self.at:
            raise _Short
        return int(found)

    def value(self) -> Any:
        kind = self.unpack("I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _NUMBERS:
            raise _Short
        return self.unpack(_NUMBERS[kind])

    def _array(self) -> "array[Any] | Strings":
        kind = self.unpack("I")
        if kind == _STRING:
            return self._strings(self.count(8))
        if kind not in _NUMBERS:  # arrays of arrays are not in use, and the library refuses them too
            raise _Short
        found: array[Any] = array(_NUMBERS[kind].replace("?", "B"))
        found.frombytes(self.take(self.count(found.itemsize) * found.itemsize))
        if sys.byteorder == "big":
            found.byteswap()
        return found

    def _strings(self, num_strings: int) -> Strings:
        begin, at, limit, read, ends = self.at, self.at, len(self.data) - 8, struct.Struct("<Q").unpack_from, array("Q")
        for _ in range(num_strings):
            if at > limit:
                raise _Short
            at += 8 + read(self.data, at)[0]
            if at > len(self.data):
                raise _Short
            ends.append(at - begin)
        return Strings(self.take(at - begin), ends)


def _read(path: Path, data: mmap.mmap) -> GgufFile:
    reader = _Reader(data)
    _check_version(path, reader)
    reader.at = 8
    num_tensors, num_pairs = reader.count(24), reader.count(13)
    metadata = {reader.string(): reader.value() for _ in range(num_pairs)}
    if fault := fault_of(metadata):
        raise StartupFailed(f"{path} is damaged or unusual: {fault}; download it again, or use another model")
    metadata_bytes = reader.at
    data_bytes = max((_tensor_end(reader) for _ in range(num_tensors)), default=0)
    alignment = _alignment(metadata)
    needed = reader.at + -reader.at % alignment + data_bytes if num_tensors else 0
    if len(data) < needed:
        raise StartupFailed(f"{path} is cut short: {len(data):,} of {needed:,} bytes are there; download it again")
    return GgufFile(path, (path,), struct.unpack_from("<I", data, 4)[0], metadata, num_tensors, metadata_bytes, data_bytes)


def _check_version(path: Path, reader: _Reader) -> None:
    reader.at = 4
    version = reader.unpack("I")
    if version not in _VERSIONS:
        kind = "is of a big-endian machine" if version & 0xFFFF == 0 else f"has version {version} of the format"
        raise StartupFailed(f"{path} {kind}; convert the model again, to GGUF version 3")


def _alignment(metadata: Mapping[str, Any]) -> int:
    found = metadata.get("general.alignment", 32)
    if not isinstance(found, int) or not 1 <= found <= _MAX_ALIGNMENT:
        raise _Short
    return found


def _tensor_end(reader: _Reader) -> int:
    """Where the next tensor of the table ends, from the beginning of the data."""
    reader.string()
    if (num_dimensions := reader.unpack("I")) > _MAX_DIMENSIONS:
        raise _Short
    shape = [reader.unpack("Q") for _ in range(num_dimensions)]
    block, block_bytes = _TENSOR_TYPES.get(reader.unpack("I"), (prod(shape) or 1, 1))
    return int(reader.unpack("Q") + -(-prod(shape) // block) * block_bytes)
