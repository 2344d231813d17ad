"""What a piece of a Hugging Face vocabulary stands for, after other text: the library's decoders, one token at a time. Pure.

The library decodes whole texts only, and gives out a replacement character for a token that is part of one. Streams need the bytes.
A decoder that looks at more than one token, at any place but the beginning of a text, is refused.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

_Step = Callable[[str | bytes], str | bytes]

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins for bytes of byte-level vocabularies (openai/gpt-2, encoder.py, `bytes_to_unicode`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in plain]
    return {chr(value): value for value in plain} | {chr(256 + index): value for index, value in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def piece_reader(decoder: Any) -> Callable[[str], bytes]:
    """How to read the pieces of a vocabulary with this decoder, a parsed `decoder` of a `tokenizer.json`; None: it has none.

    Raises ValueError for a decoder that cannot be applied to one token at a time.
    """
    steps = list(_steps(decoder))

    def read(piece: str) -> bytes:
        value: str | bytes = piece
        for step in steps:
            value = step(value)
        return value.encode("utf-8", "replace") if isinstance(value, str) else value

    return read


def _flat(decoder: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(decoder, dict):
        raise ValueError("a decoder is a map")
    if decoder.get("type") == "Sequence":
        for part in decoder.get("decoders", ()):
            yield from _flat(part)
    else:
        yield decoder


def _steps(decoder: Any) -> Iterator[_Step]:
    if decoder is None:
        yield lambda piece: " " + _text(piece)
        return
    is_fused = False
    for part in _flat(decoder):
        kind = part.get("type")
        if kind == "Fuse":
            is_fused = True
        elif kind == "Strip" and is_fused:  # of a whole text: its beginning is no concern of a piece that stands after others
            if part.get("stop"):
                raise ValueError("its decoder strips the end of a text")
        elif kind in _STEPS:
            yield _STEPS[kind](part, is_fused)
            is_fused |= kind == "ByteLevel"
        else:
            raise ValueError(f"its decoder {kind} cannot be applied to a stream")


def _text(piece: str | bytes) -> str:
    return piece if isinstance(piece, str) else piece.decode("utf-8", "replace")


def _of_text(change: Callable[[str], str | bytes]) -> _Step:
    """A step that leaves alone what is bytes already."""
    return lambda piece: change(piece) if isinstance(piece, str) else piece


def _replace(part: dict[str, Any], is_fused: bool) -> _Step:
    pattern, content = part.get("pattern"), str(part.get("content", ""))
    found = pattern.get("String") if isinstance(pattern, dict) else None
    if not isinstance(found, str) or not found or (is_fused and len(found) > 1):
        raise ValueError("its decoder replaces what may span tokens")
    return _of_text(lambda piece: piece.replace(found, content))


def _strip(part: dict[str, Any], is_fused: bool) -> _Step:
    content, start, stop = str(part.get("content", " ")), int(part.get("start", 0)), int(part.get("stop", 0))

    def strip(piece: str) -> str:
        first, last = 0, len(piece)
        while first < min(start, last) and piece[first] == content:
            first += 1
        while last > first and len(piece) - last < stop and piece[last - 1] == content:
            last -= 1
        return piece[first:last]

    return _of_text(strip)


def _byte_fallback(part: dict[str, Any], is_fused: bool) -> _Step:
    def read(piece: str) -> str | bytes:
        found = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(found[1], 16)]) if found else piece

    return _of_text(read)


def _byte_level(part: dict[str, Any], is_fused: bool) -> _Step:
    def read(piece: str) -> bytes:
        try:
            return bytes(map(BYTE_ALPHABET.__getitem__, piece))
        except KeyError:  # a token that was added as it is
            return piece.encode("utf-8", "replace")

    return _of_text(read)


def _metaspace(part: dict[str, Any], is_fused: bool) -> _Step:
    replacement = str(part.get("replacement", "▁"))
    return _of_text(lambda piece: piece.replace(replacement, " "))


_CLEANED: tuple[tuple[str, str], ...] = (
    *((" " + mark, mark) for mark in (".", "?", "!", ",")),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    *((" " + ending, ending) for ending in ("'s", "'ve", "'re")),
)
"""What WordPiece vocabularies write without the space before it, in the library's order."""


def _word_piece(part: dict[str, Any], is_fused: bool) -> _Step:
    prefix, is_cleaned = str(part.get("prefix", "##")), part.get("cleanup", True) is True

    def read(piece: str) -> str:
        text = piece.replace(prefix, "", 1) if piece.startswith(prefix) else " " + piece
        for found, content in _CLEANED if is_cleaned else ():
            text = text.replace(found, content)
        return text

    return _of_text(read)


_STEPS: dict[str, Callable[[dict[str, Any], bool], _Step]] = {
    "Replace": _replace,
    "Strip": _strip,
    "ByteFallback": _byte_fallback,
    "ByteLevel": _byte_level,
    "Metaspace": _metaspace,
    "WordPiece": _word_piece,
}
