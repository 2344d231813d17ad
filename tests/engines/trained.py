"""Small tokenizers of each kind, trained here, as files of a model."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = (Path(__file__).parent / "corpus.txt").read_text().split("\f\n")
"""Source code and prose, which never change: tokenizers of today and of tomorrow are the same."""
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]


@lru_cache
def files_of(kind: str) -> dict[str, bytes]:
    """`byte-level`, `metaspace`, `byte-fallback` or `word-piece`. Not to be changed."""
    tokenizer = _MAKERS[kind]()
    tokenizer.enable_truncation(8)  # as files of embedding models have it: a prompt must not be cut short by it
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "chat_template": CHAT}
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def with_config(kind: str, **config: Any) -> dict[str, bytes]:
    """The same with other things in its `tokenizer_config.json`; None takes one away."""
    files = files_of(kind)
    changed = {**json.loads(files["tokenizer_config.json"]), **config}
    kept = {key: value for key, value in changed.items() if value is not None}
    return {**files, "tokenizer_config.json": json.dumps(kept).encode()}


def write_directory(directory: Path, files: dict[str, bytes]) -> Path:
    """A model's directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def _byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["<tool call>"])
    return tokenizer


def _unigram(pieces: list[str], has_fallback: bool) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"] += [[piece, -20.0] for piece in pieces]
    state["model"]["byte_fallback"] = has_fallback
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _metaspace() -> tokenizers.Tokenizer:
    tokenizer = _unigram([], False)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 has it."""
    tokenizer = _unigram([f"<0x{value:02X}>" for value in range(256)], True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _word_piece() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False))
    return tokenizer


_MAKERS = {"byte-level": _byte_level, "metaspace": _metaspace, "byte-fallback": _byte_fallback, "word-piece": _word_piece}
KINDS = sorted(_MAKERS)
