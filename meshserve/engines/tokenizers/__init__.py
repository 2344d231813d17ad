"""Text to token ids and back, as a model's card asks for it."""

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points

from meshserve.engines.tokenizers.own import EOS_TOKEN, WORD_LISTS, WORD_RANGES, ByteTokenizer
from meshserve.engines.tokenizers.protocol import Tokenizer, Vocabulary
from meshserve.errors import TokenizerFailed

__all__ = ["EOS_TOKEN", "WORD_LISTS", "WORD_RANGES", "ByteTokenizer", "Tokenizer", "Vocabulary", "load_tokenizer"]


_GROUP = "meshserve.tokenizers"
_OWN = {
    "bytes": "meshserve.engines.tokenizers.own:byte_tokenizer",
    "huggingface": "meshserve.engines.tokenizers.huggingface:HuggingFaceTokenizer",
}
"""The kinds of this package, also when it runs from a source tree that was never installed. Each is called with the files."""


def load_tokenizer(kind: str, files: Mapping[str, bytes] | None = None) -> Tokenizer:
    """The tokenizer that a card calls `kind`, made of the files that it names: an entry point of the group `meshserve.tokenizers`.

    Raises TokenizerFailed if it cannot be had here, with the package that is missing. Reading the files takes up to seconds, during which
    no other thread runs: not for an event loop's process.
    """
    target = _OWN.get(kind) or _installed(kind)
    if target is None:
        raise TokenizerFailed(f"the tokenizer {kind!r} is unknown here; install the package of the model's engine on this machine too")
    module_name, _, attribute = target.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise TokenizerFailed(f"the tokenizer {kind!r} needs the package {error.name!r}; install it on this machine") from error
    except (ImportError, AttributeError, ValueError) as error:
        raise TokenizerFailed(f"the tokenizer {kind!r} cannot be loaded: {error}") from error
    tokenizer: Tokenizer = factory(files or {})
    return tokenizer


def _installed(kind: str) -> str | None:
    return next((found.value for found in entry_points(group=_GROUP) if found.name == kind), None)
