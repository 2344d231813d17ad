"""The card on which a worker says what it serves: model, tokenizer and KV layout. It travels in every hello."""

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from meshserve.errors import ProtocolError

FEATURES = ("logprobs", "penalties", "logit_bias", "json_schema", "regex", "tools", "tool_text")
"""`json_schema`, `regex`: output that is valid under a schema, or matches an expression; `tools`: it calls one where it is made to by a
schema; `tool_text`: it writes calls and reasoning as text. Requests for what a model cannot do are refused."""

FILE_NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
"""What a card may name: files of a Hugging Face model directory. A name from the network is only ever compared with these."""
MAX_FILE_BYTES = 64 * 1024 * 1024
"""The longest file; the largest `tokenizer.json` of today has 33 MB. Higher lets one hostile card cost that much memory and disk."""

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file of the model that the processor needs, by its contents. Workers give it out over the mesh."""

    name: str
    """Of :data:`FILE_NAMES`."""
    size_bytes: int
    sha256: str
    """Of its contents, in hexadecimal digits; what it is asked for by, and what it is checked against."""

    @classmethod
    def from_wire(cls, data: Any) -> "ModelFile":
        """Raises ProtocolError for missing or malformed fields, or a file that is too long."""
        name, size_bytes, sha256 = (data.get(key) for key in ("name", "size_bytes", "sha256")) if isinstance(data, dict) else (None,) * 3
        if not isinstance(name, str) or type(size_bytes) is not int or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise ProtocolError("a model card's file has a name, a size and a hash")
        if not 0 <= size_bytes <= MAX_FILE_BYTES:
            raise ProtocolError(f"a model card's file {name[:40]!r} is too long")
        return cls(name, size_bytes, sha256)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a worker's engine serves. Two workers may hand KV blocks to each other only if their cards are equal."""

    model: str
    """The name that requests carry."""
    model_hash: str
    """Digest over all that makes the model's output: equal hashes, equal tokens."""
    context_length: int
    """Prompt and output together, in tokens."""
    tokenizer: str
    """Which tokenizer the processor must use: `bytes` is the dummy model's own, `huggingface` is made of `files`."""
    chat_template: str
    """Jinja, rendered by the processor, for a model whose files hold none. Empty: those do, or it has none."""
    default_temperature: float
    """For requests that name none, as a model's `generation_config.json` has it; 0 is greedy."""
    layers: int
    """KV layout: attention layers."""
    dtype: str
    """KV layout: element type."""
    kv_bytes_per_token: int
    """KV layout: bytes of all layers for one token."""
    block_size: int
    """KV layout: tokens per block."""
    can_hand_over: bool
    """Whether the engine gives out and takes in KV blocks at all."""
    features: tuple[str, ...] = ()
    """What the engine can do beyond sampling with temperature, top_p, top_k and a seed: of :data:`FEATURES`."""
    files: tuple[ModelFile, ...] = ()
    """What makes the tokenizer and the chat template: of each name one at most."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one full KV block."""
        return self.block_size * self.kv_bytes_per_token

    def to_wire(self) -> dict[str, Any]:
        """Plain data for :meth:`from_wire`."""
        return asdict(self)

    @classmethod
    def from_wire(cls, data: Any) -> "ModelCard":
        """The card in a peer's hello. Unknown fields are ignored; missing or mistyped ones raise ProtocolError."""
        if not isinstance(data, dict):
            raise ProtocolError("a model card is a map")
        values = {}
        for field in fields(cls):
            if field.name in ("features", "files"):
                continue
            value = data.get(field.name)
            expected: Any = {str: str, int: int, float: (int, float), bool: bool}[field.type]  # type: ignore[index]  # all fields are plain types
            if not isinstance(value, expected) or (field.type is int and (isinstance(value, bool) or not 0 <= value < 2**40)):
                raise ProtocolError(f"the model card's {field.name} is missing or malformed")
            values[field.name] = value
        if values["block_size"] < 1 or values["kv_bytes_per_token"] < 0 or values["context_length"] < 1:
            raise ProtocolError("the model card's sizes are out of range")
        features = data.get("features", [])
        if not isinstance(features, (list, tuple)) or not all(isinstance(name, str) for name in features):
            raise ProtocolError("the model card's features are malformed")
        return cls(**values, features=tuple(name for name in features if name in FEATURES), files=_files(data.get("files", [])))


def _files(data: Any) -> tuple[ModelFile, ...]:
    """Those whose names are known here; a newer peer may name others too."""
    if not isinstance(data, (list, tuple)) or len(data) > 16:
        raise ProtocolError("the model card's files are malformed")
    found = [file for file in map(ModelFile.from_wire, data) if file.name in FILE_NAMES]
    if len({file.name for file in found}) != len(found):
        raise ProtocolError("the model card names a file twice")
    return tuple(found)
