"""Text to token ids and back, as a model's card asks for it."""

from collections.abc import Mapping

from meshserve.engines.tokenizers.own import EOS_TOKEN, WORD_LISTS, WORD_RANGES, ByteTokenizer
from meshserve.engines.tokenizers.protocol import Tokenizer, Vocabulary
from meshserve.errors import TokenizerFailed

__all__ = ["EOS_TOKEN", "WORD_LISTS", "WORD_RANGES", "ByteTokenizer", "Tokenizer", "Vocabulary", "load_tokenizer"]


def load_tokenizer(kind: str, files: Mapping[str, bytes] | None = None) -> Tokenizer:
    """The tokenizer that a card calls `kind`, made of the files that it names. Raises TokenizerFailed if it cannot be had here.

    Reading the files takes up to seconds, during which no other thread runs: not for an event loop's process.
    """
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "huggingface":
        from meshserve.engines.tokenizers.huggingface import HuggingFaceTokenizer  # its library is loaded where one is used

        return HuggingFaceTokenizer(files or {})
    raise TokenizerFailed(f"the tokenizer {kind!r} is unknown to this version of meshserve")
