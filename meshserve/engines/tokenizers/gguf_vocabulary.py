"""A GGUF file's vocabulary as the files of a Hugging Face model, from which any processor makes the tokenizer without llama.cpp. Pure.

Encodes, token by token, what llama.cpp's tokenizer does with the same vocabulary, its peculiarities included: what is not known to be
exact is refused, with the reason.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshserve.engines.tokenizers.gguf_pretokenizers import ALIASES, BOS_BY_DEFAULT, IGNORES_MERGES, SPLITS
from meshserve.engines.tokenizers.pieces import BYTE_ALPHABET, piece_reader
from meshserve.errors import TokenizerFailed

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_MOST_LETTERS, _MOST_SPECIAL_LETTERS, _MOST_OVERLAPS = 1 << 14, 256, 50_000
"""Of a token, of a special token, and of all special tokens together: what is looked at grows faster. No known model comes near."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ENDS = _names(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT]"
    " [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~["
)
"""Tokens that end a generation wherever a vocabulary has them (llama.cpp, llama-vocab.cpp)."""
_FILL_IN: Mapping[str, frozenset[str]] = {
    "pad": _names("<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]"),
    "rep": _names("<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>"),
    "sep": _names("<|file_sep|>"),
}
"""The same, for the first of each row, unless the file names another: tokens around code that is filled in."""
_CONTROLS = _ENDS.union(*_FILL_IN.values()) | _names(
    "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>"
    " <|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>"
    " <|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>"
)
_SHOWN = _names("<|channel|> <|message|> <|start|> <|constrain|>")
"""Tokens that the library shows as text, and takes as written."""
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding", "sep_token": "seperator"}
"""Special tokens by the name of their key, spelled as the format does."""
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty"}


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Contents by name (of :data:`~meshserve.wire.card.FILE_NAMES`), from a GGUF file's metadata.

    Raises TokenizerFailed, saying what is missing, for a vocabulary that cannot be turned into these files exactly.
    """
    try:
        return _files(metadata, _Vocabulary.read(metadata))
    except (TypeError, ValueError, OverflowError, AttributeError, LookupError) as error:
        raise TokenizerFailed(f"the vocabulary is damaged or unusual ({error}); download the model again, or use another") from error


def _files(metadata: Mapping[str, Any], vocabulary: "_Vocabulary") -> dict[str, bytes]:
    maker = {"gpt2": _byte_level, "llama": _sentence_piece}.get(vocabulary.model)
    if maker is None:
        raise TokenizerFailed(f"vocabularies of the kind {vocabulary.model!r} cannot be turned into a tokenizer.json")
    state = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": vocabulary.added_tokens()}
    files = {
        "tokenizer.json": _json({**state, **maker(vocabulary), "post_processor": vocabulary.template()}),
        "tokenizer_config.json": _json({**vocabulary.named_tokens(), "add_bos_token": vocabulary.adds_bos}),
        "generation_config.json": _json({"eos_token_id": vocabulary.ends(), **_sampling(metadata)}),
    }
    if template := metadata.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = str(template).encode()
    return files


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _sampling(metadata: Mapping[str, Any]) -> dict[str, float]:
    """What the file recommends for requests that say nothing."""
    found = {name: metadata.get(f"general.sampling.{key}") for key, name in _SAMPLING.items()}
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


@dataclass(slots=True)
class _Vocabulary:
    """What the metadata says of tokens, with the library's corrections."""

    metadata: Mapping[str, Any]
    model: str
    split: str
    tokens: list[str]
    kinds: list[int]
    ids: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> "_Vocabulary":
        texts = (text.partition("\0")[0] for text in metadata.get("tokenizer.ggml.tokens", ()))  # the library reads them as C strings
        listed = [text or f"[EMPTY_{token}]" for token, text in enumerate(texts)]
        kinds = list(metadata.get("tokenizer.ggml.token_type", ()))[: len(listed)]
        named = str(metadata.get("tokenizer.ggml.pre", "") or "default")
        model = str(metadata.get("tokenizer.ggml.model", ""))
        found = cls(metadata, model, ALIASES.get(named, named), listed, kinds or [_NORMAL] * len(listed))
        found.ids = {text: token for token, text in enumerate(listed)}
        if not listed or len(found.ids) != len(listed) or len(found.kinds) != len(listed):
            raise TokenizerFailed("the model's vocabulary is missing or damaged; download the model again")
        if max(map(len, listed)) > _MOST_LETTERS:
            raise TokenizerFailed(f"a token is longer than {_MOST_LETTERS:,} characters; download the model again, or use another")
        if any(name in str(metadata.get("general.name", "")).lower() for name in ("phi-3", "phi3")):
            raise TokenizerFailed("the special tokens of Phi-3 take the white space after them away, which a tokenizer.json cannot say")
        found._correct()
        return found

    def _correct(self) -> None:
        """Kinds of tokens that the library knows better than the file."""
        for text in _CONTROLS & self.ids.keys():
            self.kinds[self.ids[text]] = _CONTROL
        for text in _SHOWN & self.ids.keys():
            self.kinds[self.ids[text]] = _USER_DEFINED

    def special(self, name: str) -> int | None:
        """A token by the name of its key, or the library's own choice for this kind of vocabulary."""
        found = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(found, int) and 0 <= found < len(self.tokens):
            return found
        usual = {"bos": 11, "eos": 11} if self.model == "gpt2" else {"bos": 1, "eos": 2, "unknown": 0}
        token = usual.get(name)
        return token if token is not None and token < len(self.tokens) else None

    @property
    def adds_bos(self) -> bool:
        return bool(self.metadata.get("tokenizer.ggml.add_bos_token", self.model == "llama" or self.split in BOS_BY_DEFAULT))

    def named_tokens(self) -> dict[str, str]:
        found = {name: self.special(key) for name, key in _NAMES.items()}
        return {name: self.tokens[token] for name, token in found.items() if token is not None}

    def ends(self) -> list[int]:
        """The tokens that end a generation, the model's own first."""
        found = {self.ids[text] for text in _ENDS & self.ids.keys()}
        for name, texts in _FILL_IN.items():
            named = self.special(f"fim_{name}")
            found.update([named] if named is not None else sorted(self.ids[text] for text in texts & self.ids.keys())[:1])
        own = [token for name in ("eos", "eot", "eom") if (token := self.special(name)) is not None]
        names = {self.tokens[token] for token in found}
        if "<|end|>" in names and ({"<|return|>", "<|call|>"} <= names or ("<|flush|>" in names and names & {"<|call|>", "<|calls|>"})):
            found.discard(self.ids["<|end|>"])
        if {"<|tool_response>", "</s>"} <= names:
            found.discard(self.ids["</s>"])
        return list(dict.fromkeys([*own, *sorted(found)]))

    def added_tokens(self) -> list[dict[str, Any]]:
        """Tokens that are recognised in a text before all else. Raises TokenizerFailed where the order in which they are matters."""
        kept = {token: kind for token, kind in enumerate(self.kinds) if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED)}
        _check_overlaps([self.tokens[token] for token in kept])
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [{"id": token, "content": self.tokens[token], **flags, "special": kind != _USER_DEFINED} for token, kind in kept.items()]

    def template(self) -> dict[str, Any] | None:
        """What stands around a text: as the library does, also where the text begins with it."""
        adds_eos = bool(self.metadata.get("tokenizer.ggml.add_eos_token", False))
        before = [self.special("bos")] if self.adds_bos else []
        after = [self.special("eos")] if adds_eos else []
        around = {self.tokens[token]: token for token in (*before, *after) if token is not None}
        if not around:
            return None
        parts = [
            *({"SpecialToken": {"id": self.tokens[token], "type_id": 0}} for token in before if token is not None),
            {"Sequence": {"id": "A", "type_id": 0}},
            *({"SpecialToken": {"id": self.tokens[token], "type_id": 0}} for token in after if token is not None),
        ]
        named = {text: {"id": text, "ids": [token], "tokens": [text]} for text, token in around.items()}
        return {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": named}


def _check_overlaps(texts: list[str]) -> None:
    """The library looks for the longest special token first, wherever it stands; `tokenizers` for the one that begins first."""
    if too_long := next((text for text in texts if len(text) > _MOST_SPECIAL_LETTERS), ""):
        raise TokenizerFailed(
            f"the special token {too_long[:20]!r}... is longer than {_MOST_SPECIAL_LETTERS} characters; use another model"
        )
    known, num_overlaps = set(texts), 0
    lengths = sorted(set(map(len, texts)), reverse=True)
    begins: dict[str, list[str]] = {}
    for text in texts:
        for length in range(1, len(text)):
            begins.setdefault(text[:length], []).append(text)
    for first in texts:
        for at in range(1, len(first)):
            for second in begins.get(first[at:], ()):
                if (num_overlaps := num_overlaps + 1) > _MOST_OVERLAPS:
                    raise TokenizerFailed("too many of the special tokens overlap; use another model")
                joined = first[:at] + second
                longest = next(length for length in lengths if joined[:length] in known)
                if joined[:longest] != second and len(second.encode()) >= len(joined[:longest].encode()):
                    raise TokenizerFailed(f"the special tokens {first!r} and {second!r} overlap, and a tokenizer.json takes the first")


def _byte_level(vocabulary: _Vocabulary) -> dict[str, Any]:
    if vocabulary.split not in SPLITS:
        raise TokenizerFailed(f"how this model splits text into words ({vocabulary.split!r}) is unknown to this version of meshserve")
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    read = piece_reader(decoder)
    for token, kind in enumerate(vocabulary.kinds):
        text = vocabulary.tokens[token]
        if kind == _USER_DEFINED and read(text) != text.encode():
            raise TokenizerFailed(f"the token {text!r} stands for itself, which a tokenizer.json cannot say of its characters")
    ignores_merges = vocabulary.split in IGNORES_MERGES
    model = {"type": "BPE", "vocab": vocabulary.ids, "merges": _merges(vocabulary), "ignore_merges": ignores_merges}
    words = {"type": "Sequence", "pretokenizers": list(_word_steps(vocabulary, ignores_merges))}
    return {"normalizer": None, "pre_tokenizer": words, "decoder": decoder, "model": model}


def _word_steps(vocabulary: _Vocabulary, ignores_merges: bool) -> Iterator[dict[str, Any]]:
    """How a text becomes words, written in letters that stand for bytes."""
    for pattern in SPLITS[vocabulary.split]:
        yield {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    yield {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    missing = "".join(rf"\x{{{ord(letter):X}}}" for letter in BYTE_ALPHABET if letter not in vocabulary.ids)
    if missing and ignores_merges:
        raise TokenizerFailed("the vocabulary has no tokens for some single bytes, and takes whole words")
    if missing:  # a byte that is no token is left out, but what stands around it is not joined; `tokenizers` would join it
        yield {"type": "Split", "pattern": {"Regex": f"[{missing}]"}, "behavior": "Removed", "invert": False}


def _merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Pairs of tokens that are joined, the first before all others; of a pair that is named twice, the first place counts."""
    found: dict[tuple[str, str], None] = {}
    for merge in vocabulary.metadata.get("tokenizer.ggml.merges", ()):
        first, _, second = merge[1:].partition(" ")
        found[merge[:1] + first, second] = None
    ids = vocabulary.ids
    for left, right in found:
        if left not in ids or right not in ids or left + right not in ids:
            raise TokenizerFailed(f"the merge of {left!r} and {right!r} makes no token; the model's vocabulary is damaged")
    return list(found)


def _sentence_piece(vocabulary: _Vocabulary) -> dict[str, Any]:
    """Pairs of tokens that make a token are joined by its score, the highest first; what is no token becomes its bytes."""
    scores = vocabulary.metadata.get("tokenizer.ggml.scores", array("f"))
    if len(scores) < len(vocabulary.tokens) or any(f"<0x{value:02X}>" not in vocabulary.ids for value in range(256)):
        raise TokenizerFailed("the vocabulary has no scores, or no tokens for single bytes")
    made = _pairs(vocabulary)
    made.sort(key=lambda found: -scores[found[0]])  # of one score: in the order of the ids
    _check_ties(made, scores)
    has_prefix = bool(vocabulary.metadata.get("tokenizer.ggml.add_space_prefix", True))
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = {"type": "Sequence", "normalizers": [*([{"type": "Prepend", "prepend": "▁"}] if has_prefix else []), escape]}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    unescape = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoder = {"type": "Sequence", "decoders": [unescape, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}
    merges = [(first, second) for _, first, second in made]
    model = {"type": "BPE", "vocab": vocabulary.ids, "merges": merges, "byte_fallback": True, "fuse_unk": True}
    return {"normalizer": normalizer, "pre_tokenizer": None, "decoder": decoder, "model": model}


def _check_ties(made: list[tuple[int, str, str]], scores: Sequence[float]) -> None:
    """Of two pairs of one score that share a token, the library joins the one that stands first; `tokenizers` always the same one."""
    num_tokens = Counter(scores[token] for token in {token for token, _, _ in made})
    tied = [(scores[token], *found) for found in made if num_tokens[scores[token := found[0]]] > 1]
    left_of: dict[tuple[float, str], set[int]] = {}
    for score, token, first, _ in tied:
        left_of.setdefault((score, first), set()).add(token)
    for score, token, _, second in tied:
        if left_of.get((score, second), {token}) != {token}:
            raise TokenizerFailed("tokens of one score overlap, so that their place in the text decides, which a tokenizer.json cannot say")


def _pairs(vocabulary: _Vocabulary) -> list[tuple[int, str, str]]:
    """Each token that two others make, with these two."""
    ids, kinds, found = vocabulary.ids, vocabulary.kinds, []
    for token, text in enumerate(vocabulary.tokens):
        if kinds[token] in (_NORMAL, _UNUSED, _BYTE) or "▁" in text:
            for at in range(1, len(text)):
                if (first := text[:at]) in ids and (second := text[at:]) in ids:
                    found.append((token, first, second))
    return found
