"""Tokenizers of Hugging Face models: a `tokenizer.json` in the `tokenizers` library."""

import json
import os
from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from meshserve.engines.tokenizers.pieces import piece_reader
from meshserve.engines.tokenizers.settings import TextSettings
from meshserve.engines.tokenizers.table import TokenTable
from meshserve.errors import TokenizerFailed

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # read by the library: one text at a time needs no pool of threads

import tokenizers

MAX_VOCAB_SIZE = 2_097_152
"""Eight times the largest vocabulary of today; a made-up token id must not be given a table as long as it is large."""
_COMMON_EOS = ("<|endoftext|>", "</s>", "<|im_end|>", "<|eot_id|>", "<eos>", "<|end_of_text|>", "[SEP]")
"""Where the files do not say how a sequence ends."""
CALL_MARKS = frozenset(
    ("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|python_tag|>"),
)
"""Special tokens that are text all the same: who reads a model's calls of tools and its reasoning must see where they begin."""


class HuggingFaceTokenizer:
    """Made of a model's files, by name: `tokenizer.json`, and what there is of the others. Raises TokenizerFailed if they will not do."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.settings = TextSettings.of_files(files)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self.table = self._read_vocabulary()
        except KeyError as error:
            raise TokenizerFailed("there is no tokenizer.json") from error
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare ones, and for its own bugs one that is no Exception
            raise TokenizerFailed(f"this tokenizer.json cannot be used: {error}") from error
        self.eos_token, self.eos_tokens, self.vocab_size = self.table.eos_token, self.table.eos_tokens, self.table.vocab_size
        self.token_bytes = self.table.token_bytes
        self._bos = self._find_bos()

    def encode(self, text: str, add_special_tokens: bool = True) -> "array[int]":
        """Special tokens that the text spells out are recognised, as the library does by default."""
        if not text.isascii():
            text = text.encode("utf-8", "replace").decode()
        # one text as a batch: it keeps no offsets, which saves a quarter of the time
        (found,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        tokens = array("I", found.ids)
        if add_special_tokens and self._bos is not None:
            begins = bool(tokens) and tokens[0] == self._bos
            if self.settings.add_bos_token and not begins:
                tokens.insert(0, self._bos)
            elif begins and not self.settings.add_bos_token:
                del tokens[0]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The library's own: a space that only stands for the beginning of the text is dropped."""
        text: str = self._tokenizer.decode([token for token in tokens if 0 <= token < self.vocab_size], skip_special_tokens=True)
        return text

    def _find_bos(self) -> int | None:
        """The beginning of sequence, if `tokenizer_config.json` says whether to add it and `tokenizer.json` does otherwise."""
        wanted, token = self.settings.add_bos_token, self.settings.special_tokens.get("bos_token")
        bos = self._tokenizer.token_to_id(token) if token is not None and wanted is not None else None
        if bos is None:
            return None
        is_added = self._tokenizer.encode("").ids[:1] == [bos]
        return bos if is_added != wanted else None

    def _read_vocabulary(self) -> TokenTable:
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=-1) + 1
        if not 0 < size <= MAX_VOCAB_SIZE:
            raise ValueError(f"it has token ids up to {size - 1}")
        added = self._tokenizer.get_added_tokens_decoder()
        read = piece_reader(_state(self._tokenizer.decoder))
        pieces = [b""] * size
        for piece, token in vocabulary.items():
            if token not in added or not added[token].special or piece in CALL_MARKS:
                pieces[token] = read(piece)
        eos_tokens = self._find_eos(size)
        for token in eos_tokens:
            pieces[token] = b""
        return TokenTable(b"".join(pieces), array("I", accumulate(map(len, pieces), initial=0)), eos_tokens)

    def _find_eos(self, vocab_size: int) -> tuple[int, ...]:
        named = self.settings.special_tokens.get("eos_token")
        by_name = [self._tokenizer.token_to_id(named)] if named else []
        found = [token for token in (*by_name, *self.settings.eos_ids) if token is not None and token < vocab_size]
        if not found:
            found = [token for name in _COMMON_EOS if (token := self._tokenizer.token_to_id(name)) is not None][:1]
        if not found:
            raise ValueError("nothing says which token ends a sequence; name an eos_token in tokenizer_config.json")
        return tuple(dict.fromkeys(found))


def _state(part: Any) -> Any:
    """The library's description of a part of a tokenizer, as it stands in the file."""
    return None if part is None else json.loads(part.__getstate__())
