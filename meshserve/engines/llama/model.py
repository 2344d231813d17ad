"""A model in a GGUF file, as llama.cpp loads it: its metadata, its vocabulary, its weights."""

import ctypes
import os
from array import array
from collections.abc import Callable
from pathlib import Path

from meshserve.engines.llama.library import Library, load_library
from meshserve.errors import StartupFailed

_MAGIC = b"GGUF"
# What llama.cpp says, and what it means to a user. The first line of each refusal is searched.
_REASONS = (
    ("unknown model architecture", "its architecture is one that this version of llama.cpp does not know ({reason}): use another model"),
    ("not within the file bounds", "it is truncated: download it again"),
    ("remaining file size", "it is truncated: download it again"),
    ("failed to read", "it is truncated: download it again"),
    ("failed to load model split", "one of its parts is missing or truncated: download all of them into one directory"),
    ("unable to allocate", "there is not enough memory ({reason}): use a smaller model, or end other programs"),
)


class LlamaModel:
    """A loaded model. What it says of itself never changes; it may be read from any thread until :meth:`close`.

    With `vocab_only` only the metadata and the vocabulary are loaded: a file without tensors will do, and no context can be made.
    Raises StartupFailed, with a line that says what is wrong with the file and what to do.
    """

    def __init__(self, path: Path, *, vocab_only: bool = False, num_gpu_layers: int = -1) -> None:
        _check_file(path)
        self.path = path
        self.vocab_only = vocab_only
        self.library: Library = load_library()
        self._functions = self.library.functions
        self.handle: int | None = self._load(num_gpu_layers)
        self._vocabulary = self._functions.llama_model_get_vocab(self.handle)
        self._describe()
        if reason := self._why_unusable():
            self.close()
            raise StartupFailed(f"{path} cannot be served: {reason}: use a model that generates text")

    def _load(self, num_gpu_layers: int) -> int:
        params = self._functions.llama_model_default_params()
        params.vocab_only, params.n_gpu_layers = self.vocab_only, num_gpu_layers
        self.library.route_log()
        self.library.take_error()
        handle: int | None = self._functions.llama_model_load_from_file(os.fsencode(self.path), params)
        if not handle:
            reason = self.library.take_error()
            says = next((says for found, says in _REASONS if found in reason), "llama.cpp refuses it ({reason}): use another file")
            raise StartupFailed(f"{self.path} cannot be loaded: {says.format(reason=reason.split('error loading model: ')[-1])}")
        return handle

    def _describe(self) -> None:
        call, model, vocabulary = self._functions, self.handle, self._vocabulary
        self.architecture = self.metadata("general.architecture") or ""
        self.description = _read_text(lambda buffer, size: call.llama_model_desc(model, buffer, size)) or ""
        self.chat_template = self.metadata("tokenizer.chat_template") or ""
        self.n_ctx_train: int = call.llama_model_n_ctx_train(model)
        self.n_layer: int = call.llama_model_n_layer(model)
        self.sliding_window: int = call.llama_model_n_swa(model)
        """Tokens that its sliding-window layers see; 0 without such layers."""
        self.size_bytes: int = call.llama_model_size(model)
        self.is_recurrent: bool = call.llama_model_is_recurrent(model)
        self.is_hybrid: bool = call.llama_model_is_hybrid(model)
        self.has_encoder: bool = call.llama_model_has_encoder(model)
        self.vocabulary_size: int = call.llama_vocab_n_tokens(vocabulary)
        self.bos_token: int | None = _token(call.llama_vocab_bos(vocabulary))
        self.eos_token: int | None = _token(call.llama_vocab_eos(vocabulary))
        self.adds_bos: bool = call.llama_vocab_get_add_bos(vocabulary)

    def _why_unusable(self) -> str:
        if self.has_encoder or not self._functions.llama_model_has_decoder(self.handle):
            return f"it is an encoder model ({self.architecture})"
        pooling = self.metadata(f"{self.architecture}.pooling_type") or "0"
        if pooling != "0" or self.metadata(f"{self.architecture}.attention.causal") == "false":
            return f"it is an embedding model ({self.architecture})"
        return "it has no vocabulary" if not self.vocabulary_size else ""

    def metadata(self, key: str) -> str | None:
        """A value of the file's metadata as text; None if the file has none, or if it is an array."""
        call, model = self._functions, self.handle
        return _read_text(lambda buffer, size: call.llama_model_meta_val_str(model, key.encode(), buffer, size))

    def is_end_of_generation(self, token: int) -> bool:
        """Whether the model ends its output with this token; several tokens may do."""
        return 0 <= token < self.vocabulary_size and bool(self._functions.llama_vocab_is_eog(self._vocabulary, token))

    def tokenize(self, text: str, parse_special: bool, *, add_special: bool = False) -> "array[int]":
        """Tokens of a text. `parse_special`: the text of a control token becomes that token; `add_special`: with what the model puts
        around a text, such as its first token. Characters that have no UTF-8 become question marks.
        """
        data = text.encode("utf-8", "replace")
        tokens = array("i", bytes(4 * (len(data) + 8)))
        while True:
            place = (ctypes.c_int32 * len(tokens)).from_buffer(tokens)
            count = self._functions.llama_tokenize(self._vocabulary, data, len(data), place, len(tokens), add_special, parse_special)
            del place  # else the array cannot be shortened
            if count >= 0:
                del tokens[count:]
                return tokens
            tokens = array("i", bytes(4 * -count))

    def piece(self, token: int) -> bytes:
        """Text of a token, a control token's too; not always whole UTF-8. Raises ValueError for a token that is not in the vocabulary."""
        if not 0 <= token < self.vocabulary_size:
            raise ValueError(f"token {token} is not one of {self.vocabulary_size}")
        buffer = ctypes.create_string_buffer(64)
        length = self._functions.llama_token_to_piece(self._vocabulary, token, buffer, len(buffer), 0, True)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = self._functions.llama_token_to_piece(self._vocabulary, token, buffer, len(buffer), 0, True)
        return buffer.raw[:length]

    def text_pieces(self) -> list[bytes]:
        """Text of every token, for a grammar: empty for those that stand for no text, such as control tokens."""
        is_control = self._functions.llama_vocab_is_control
        return [b"" if is_control(self._vocabulary, token) else self.piece(token) for token in range(self.vocabulary_size)]

    def close(self) -> None:
        """Free the model, after all of its contexts. Harmless when called twice."""
        handle, self.handle = self.handle, None
        if handle:
            self._functions.llama_model_free(handle)


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            found = file.read(len(_MAGIC))
    except FileNotFoundError:
        raise StartupFailed(f"there is no model file {path}: check the path") from None
    except IsADirectoryError:
        raise StartupFailed(f"{path} is a directory: name the GGUF file in it") from None
    except OSError as error:
        raise StartupFailed(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    if found != _MAGIC:
        raise StartupFailed(f"{path} is no GGUF file: download the model in GGUF format, or convert it with llama.cpp's tools")


def _token(found: int) -> int | None:
    return found if found >= 0 else None


def _read_text(read: Callable[[ctypes.Array[ctypes.c_char], int], int]) -> str | None:
    """What a function of llama.cpp writes into a buffer of ours; it returns the length that the text needs, or -1."""
    buffer = ctypes.create_string_buffer(256)
    length = read(buffer, len(buffer))
    if length >= len(buffer):
        buffer = ctypes.create_string_buffer(length + 1)
        read(buffer, len(buffer))
    return buffer.raw[:length].decode("utf-8", "replace") if length >= 0 else None
