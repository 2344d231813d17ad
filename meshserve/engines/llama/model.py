"""A model in a GGUF file, as llama.cpp loads it: its vocabulary and its weights."""

import ctypes
import os
import threading
from array import array
from pathlib import Path

from meshserve.engines.llama.library import Library, load_library
from meshserve.errors import EngineFailed, StartupFailed

# What llama.cpp says, and what it means to a user. A file that is no GGUF file, or not a whole one, was refused when its header was read.
_REASONS = (
    ("unknown model architecture", "its architecture is one that this version of llama.cpp does not know ({reason}): use another model"),
    ("failed to load model split", "one of its parts is missing or truncated: download all of them into one directory"),
    ("unable to allocate", "there is not enough memory ({reason}): use a smaller model, or end other programs"),
)


class LlamaModel:
    """A loaded model. What it says of itself never changes; it may be read from any thread until :meth:`close`.

    Raises StartupFailed, with a line that says what is wrong with the file and what to do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library: Library = load_library()
        self._functions = call = self.library.functions
        self._lock = threading.Lock()
        self.handle: int | None = self._load()
        self._vocabulary = call.llama_model_get_vocab(self.handle)
        self.architecture = self.metadata("general.architecture")
        self.vocabulary_size: int = call.llama_vocab_n_tokens(self._vocabulary)
        self.sliding_window: int = call.llama_model_n_swa(self.handle)
        """Tokens that its sliding-window layers see; 0 without such layers."""
        self.has_state: bool = call.llama_model_is_recurrent(self.handle) or call.llama_model_is_hybrid(self.handle)
        """Whether some of its layers keep one state a sequence, which cannot be cut into blocks."""
        if reason := self._why_unusable():
            self.close()
            raise StartupFailed(f"{path} cannot be served: {reason}: use a model that generates text")

    def _load(self) -> int:
        self.library.route_log()
        self.library.take_error()
        params = self._functions.llama_model_default_params()
        handle: int | None = self._functions.llama_model_load_from_file(os.fsencode(self.path), params)
        if not handle:
            reason = self.library.take_error()
            says = next((says for found, says in _REASONS if found in reason), "llama.cpp refuses it ({reason}): use another file")
            raise StartupFailed(f"{self.path} cannot be loaded: {says.format(reason=reason.split('error loading model: ')[-1])}")
        return handle

    def _why_unusable(self) -> str:
        call, model = self._functions, self.handle
        if call.llama_model_has_encoder(model) or not call.llama_model_has_decoder(model):
            return f"it is an encoder model ({self.architecture})"
        pooling, causal = (self.metadata(f"{self.architecture}.{key}") for key in ("pooling_type", "attention.causal"))
        if pooling not in ("", "0") or causal == "false":
            return f"it is an embedding model ({self.architecture})"
        return "it has no vocabulary" if not self.vocabulary_size else ""

    def metadata(self, key: str) -> str:
        """The first 255 bytes of a value of the file's metadata, as text; "" if the file has none, or if it is an array."""
        buffer = ctypes.create_string_buffer(256)
        self._functions.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    def end_tokens(self) -> list[int]:
        """Those with which the model ends its output."""
        is_end = self._functions.llama_vocab_is_eog
        return [token for token in range(self.vocabulary_size) if is_end(self._vocabulary, token)]

    def tokenize(self, text: str) -> "array[int]":
        """Tokens of a text as it stands: what looks like a control token is text. Characters that have no UTF-8 become question marks."""
        data = text.encode("utf-8", "replace")
        with self._lock:  # a constraint is compiled on the event loop, and the engine's thread may have freed the model
            if self.handle is None:
                raise EngineFailed("the model is not loaded any more")
            return self._tokenize(data)

    def _tokenize(self, data: bytes) -> "array[int]":
        tokens = array("i", bytes(4 * (len(data) + 8)))
        while True:
            place = (ctypes.c_int32 * len(tokens)).from_buffer(tokens)
            count = self._functions.llama_tokenize(self._vocabulary, data, len(data), place, len(tokens), False, False)
            del place  # else the array cannot be shortened
            if count >= 0:
                del tokens[count:]
                return tokens
            tokens = array("i", bytes(4 * -count))

    def text_pieces(self) -> list[bytes]:
        """Text of every token, not always whole UTF-8: empty for those that stand for no text, such as control tokens."""
        is_control = self._functions.llama_vocab_is_control
        return [b"" if is_control(self._vocabulary, token) else self._piece(token) for token in range(self.vocabulary_size)]

    def _piece(self, token: int) -> bytes:
        length = -64
        while length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = self._functions.llama_token_to_piece(self._vocabulary, token, buffer, len(buffer), 0, True)
        return buffer.raw[:length]

    def close(self) -> None:
        """Free the model, after all of its contexts. Harmless when called twice."""
        with self._lock:
            handle, self.handle = self.handle, None
            if handle:
                self._functions.llama_model_free(handle)
