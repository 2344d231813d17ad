"""Vocabularies in GGUF files made by the tests, llama.cpp's own tokenizer to compare with, and texts that tell tokenizers apart."""

import ctypes
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from meshserve.engines.tokenizers.pieces import BYTE_ALPHABET

LETTERS = {value: letter for letter, value in BYTE_ALPHABET.items()}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def write_vocabulary(path: Path, metadata: Mapping[str, Any], architecture: str = "llama") -> Path:
    """A GGUF file of metadata only."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def _add(writer: Any, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)


def byte_level(split: str, special: Mapping[str, int], characters: str = "", **more: Any) -> dict[str, Any]:
    """A vocabulary that shows where a text is split: any two characters that are not kept apart may become one token.

    `characters`: of ASCII, for a vocabulary of these only, which is read much faster.
    """
    last = [ord(each) for each in characters] or [*range(0x80), *range(0x80, 0xC0)]
    first = [ord(each) for each in characters] or [*range(0x80), *range(0xC2, 0xF5)]
    pairs = [(LETTERS[left], LETTERS[right]) for left in last for right in first]
    random.Random(split).shuffle(pairs)
    tokens = [*LETTERS.values(), *(left + right for left, right in pairs), *special]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * (len(tokens) - len(special)) + list(special.values()),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in pairs],
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def sentence_piece(texts: Sequence[str], size: int, special: Mapping[str, int], **more: Any) -> dict[str, Any]:
    """A vocabulary trained on texts, as SentencePiece makes them: characters, pieces by score, single bytes for the rest."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(split=True)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, show_progress=False)
    tokenizer.train_from_iterator([text.replace("\0", "") for text in texts], trainer)
    learned = [piece for piece, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    runs = ["▁" * length for length in range(2, 17)]
    fixed = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, **{f"<0x{value:02X}>": BYTE for value in range(256)}, **special}
    pieces = [piece for piece in learned if len(piece) > 1 and piece not in runs and piece not in fixed] + runs
    singles = [piece for piece in learned if len(piece) == 1]
    tokens = [*fixed, *pieces, *singles]
    scores = [0.0] * len(fixed) + [-float(rank) for rank in range(len(pieces) + len(singles))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [*fixed.values()] + [NORMAL] * (len(pieces) + len(singles)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


class _ModelParameters(ctypes.Structure):
    """`struct llama_model_params` of the library's version that the tests use."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("devices", "overrides")),
        *((name, ctypes.c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, ctypes.c_void_p) for name in ("tensor_split", "progress", "progress_data", "kv_overrides")),
        *((name, ctypes.c_bool) for name in ("vocab_only", "check", "extra", "no_host", "no_alloc", "load_mtp")),
    )


_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_be_silent = _LogCallback(lambda level, text, data: None)


@lru_cache
def _library() -> ctypes.CDLL:
    pytest.importorskip("xllamacpp")
    spec = find_spec("xllamacpp")
    assert spec is not None and spec.origin is not None
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("*.so"))))
    vocabulary, token, flag = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
    declared = {
        "llama_log_set": ([_LogCallback, ctypes.c_void_p], None),
        "llama_model_default_params": ([], _ModelParameters),
        "llama_model_load_from_file": ([ctypes.c_char_p, _ModelParameters], ctypes.c_void_p),
        "llama_model_get_vocab": ([ctypes.c_void_p], vocabulary),
        "llama_model_free": ([ctypes.c_void_p], None),
        "llama_vocab_n_tokens": ([vocabulary], token),
        "llama_vocab_is_eog": ([vocabulary, token], flag),
        "llama_vocab_bos": ([vocabulary], token),
        "llama_tokenize": ([vocabulary, ctypes.c_char_p, token, ctypes.c_void_p, token, flag, flag], token),
        "llama_token_to_piece": ([vocabulary, token, ctypes.c_char_p, token, token, flag], token),
    }
    for name, (arguments, result) in declared.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    library.llama_log_set(_be_silent, None)
    library.llama_backend_init()
    return library


class LlamaVocabulary:
    """The vocabulary of a file, as llama.cpp has it. Raises ValueError if it refuses the file."""

    def __init__(self, path: Path) -> None:
        self._library = _library()
        parameters = self._library.llama_model_default_params()
        parameters.vocab_only = True
        self._model = self._library.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise ValueError(f"the library refuses {path}")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.size: int = self._library.llama_vocab_n_tokens(self._vocabulary)

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """With special tokens that the text spells out."""
        data = text.encode("utf-8", "replace")
        buffer = (ctypes.c_int32 * (len(data) + 8))()
        count = self._library.llama_tokenize(self._vocabulary, data, len(data), buffer, len(buffer), add_special, True)
        assert count >= 0
        return buffer[:count]

    def piece(self, token: int) -> bytes:
        """Bytes of a token after other text; none for special ones."""
        buffer = ctypes.create_string_buffer(1 << 16)
        count = self._library.llama_token_to_piece(self._vocabulary, token, buffer, len(buffer), 0, False)
        assert count >= 0
        return buffer.raw[:count]

    @property
    def ends(self) -> set[int]:
        return {token for token in range(self.size) if self._library.llama_vocab_is_eog(self._vocabulary, token)}

    def close(self) -> None:
        self._library.llama_model_free(self._model)


_SCRIPTS = (
    "Zażółć gęślą jaźń, I'LL can't WE'VE o'clock 'Tis rock'n'roll ſ's Kelvin's İstanbul'da",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. ЁЖ’s",
    "中文分词没有空格，数字123和英文abc混排。日本語のテスト、カタカナ・ひらがな",
    "한국어 띄어쓰기 테스트 ㄱㄴㄷ",
    "हिन्दी में संयुक्त अक्षर क्ष त्र ज्ञ १२३",
    "ภาษาไทยไม่มีช่องว่าง ๑๒๓",
    "العربية مع التشكيل مَرْحَبًا ١٢٣",
    "עברית עם נִיקּוּד",
    "ქართული ᲛᲗᲐᲕᲠᲣᲚᲘ Ελληνικά τονισμένα ᾳ Հայերեն",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ＦＵＬＬｗｉｄｔｈ ⅣⅫ ½ ² ①②㊿ 𐒠𐒡 𞤀𞤁",
    "Tiếng Việt có nhiều dấu",
    "བོད་ཡིག ខ្មែរ မြန်မာ አማርኛ ᏣᎳᎩ",
)
_SIGNS = (
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇵🇱🇯🇵 ☃️ e\u0301 a\u0300\u0323\u0331 \u0301start Z̷̛͔a̴l̵g̶o̷",
    "zero\u200bwidth\u200cjoin\u200der \ufeffbom soft\u00adhyphen",
    "\u2028line\u2029para \u0085nel \u00a0nbsp\u3000ideographic\u1680ogham\u180emvs",
    "controls \x00\x01\x07\x08\x1b[0m\x7f\x1c\x1d\x1e\x1f end \ufffd \ue000 \U000f0000 \ufffe \U0010ffff \u0378 \u2fff",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ ~~ ~a ^^ $1 +1 =a `b` |c| «» „” … — – ‘’ €£¥₿ ±×÷≤∞ ¬§¶",
    "1 12 123 1234 12345 123456 1,234.56 0x1F 1e-9 ١٢٣٤ 1½2 ⅷ３４５６ 2024-01-31T23:59:59Z 3.14159265358979",
)
_SPACING = (" ", "  ", "   ", "\n", "\n\n", "\n\n\n", " \n", "\n ", "\t", "\t\t", "\r\n", "\r\n\r\n", "\r")
_SPACES = (*_SPACING, " \t \n \r\n  ", "    ", "\u00a0 ", " \u3000", "\v\f")
_CODE = (
    'def f(x: int) -> str:\n    return f"{x!r}"  # it\'s\n\n\nclass A:\n\tpass\n',
    'for (int i=0;i<10;++i){\r\n\tprintf("%d\\n", a[i]);\r\n}\r\n',
    "SELECT * FROM t WHERE a<>'b' AND c>=1;--x",
    '<div class="a b">&nbsp;</div>\n<!-- -->',
    "https://example.org/a/b?c=d&e=%20#f user@host.tld C:\\a\\b",
    '{"a": [1, 2.50, -3e+4, null, true], "b": {"c": "d\\n\\u00e9"}}',
    "aB cDEf GHIjk XMLHttpRequest's HTML5's ÉCOLEécole ǅ ŉ ﬁ ß ẞ",
    "a//b///c /// /\n/ //\n!\n\n!!\r\n?\r",
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "<|user|>", "<0x41>", "▁", "<think>", "[PAD]")
_PARTS = ("<|im_", "|im_end|>", "Ġ")


def corpus(seed: int = 1, num_mixed: int = 300) -> Iterator[str]:
    """Texts of all kinds: each by itself, between spaces of all kinds, and mixed at random. Always the same for one seed."""
    draw = random.Random(seed)
    whole = [*_SCRIPTS, *_SIGNS, *_CODE]
    yield from ("", *whole, *_SPACES, *SPECIAL)
    for space in _SPACES:
        yield from (space + "a", "a" + space, f"a{space}b{space}1{space}!{space}é{space}中{space}", space * 7 + "x")
    for token in SPECIAL:
        yield from (f"a{token}b", f" {token} ", f"{token}{token}\n{token}x", token[:-1], token[1:])
    yield from ("a\ud800b\udfff", "\udc80")
    yield from (part * count for part in ("a", " ", "\n", "1", "é", "中", "👩‍👩‍👧‍👦", "ab ", "! ") for count in (40, 301, 700))
    atoms = [*SPECIAL, *_PARTS, *_SPACES, *(word for text in whole for word in text.split(" "))]
    for _ in range(num_mixed):
        yield "".join(draw.choice(atoms) + draw.choice(("", "", " ")) for _ in range(draw.randint(2, 12)))
    points = [point for point in range(1, 0x32400) if not 0xD800 <= point < 0xE000]
    for _ in range(num_mixed):
        share = draw.random()  # of ASCII, control characters included
        yield "".join(chr(draw.randint(1, 127) if draw.random() < share else draw.choice(points)) for _ in range(draw.randint(1, 60)))


def all_characters(contexts: Sequence[str] = ("a{}a", "1{}1", " {}a", "!{}!", "a{0}{0} ", "{}\n", "'{}s")) -> Iterator[str]:
    """Every character of Unicode in each context, many to a text."""
    points = [point for point in range(1, 0x110000) if not 0xD800 <= point < 0xE000]
    for context in contexts:
        for begin in range(0, len(points), 4096):
            yield "".join(context.format(chr(point)) for point in points[begin : begin + 4096])
