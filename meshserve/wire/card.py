"""The card on which a worker says what it serves: the model and its tokenizer. It travels in every hello."""

import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from meshserve.errors import ProtocolError

FEATURES = ("logprobs", "penalties", "logit_bias", "json_schema", "regex", "tools", "tool_text")
"""`json_schema`, `regex`: output that is valid under a schema, or matches an expression; `tools`: it calls one where it is made to by a
schema; `tool_text`: it writes calls and reasoning as text. Requests for what a model cannot do are refused."""

FILE_NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
"""What a card may name: files of a Hugging Face model directory. A name from the network is only ever compared with these."""
MAX_ALIASES = 16
"""More names of one model are refused: each is an entry of `/v1/models`."""
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
class SamplingDefaults:
    """Sampling parameters of requests that name none, as a model's `generation_config.json` has them."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is all."""
    min_p: float = 0.0
    """0 is none."""
    repetition_penalty: float = 1.0
    """1 is none."""

    @property
    def is_in_range(self) -> bool:
        """A sampler can use all of them."""
        is_cut = 0 < self.top_p <= 1 and 0 <= self.top_k < 2**31 and 0 <= self.min_p <= 1
        return is_cut and 0 <= self.temperature < 1e6 and 0.01 <= self.repetition_penalty < 1e6

    @classmethod
    def from_wire(cls, data: Any) -> "SamplingDefaults":
        """Unknown fields are ignored, missing ones have their default; others that no sampler can use raise ProtocolError."""
        given: dict[str, Any] = data if isinstance(data, dict) else {"top_k": None}
        values = {known.name: given[known.name] for known in fields(cls) if known.name in given}
        if not all(type(value) is int or (type(value) is float and name != "top_k") for name, value in values.items()):
            raise ProtocolError("the model card's sampling defaults are malformed")
        found = cls(**values)
        if not found.is_in_range:
            raise ProtocolError("the model card's sampling defaults are out of range")
        return found


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a worker's engine serves. Which workers exchange KV blocks, their :class:`~meshserve.wire.layout.KVLayout` says."""

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
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    features: tuple[str, ...] = ()
    """What the engine can do beyond sampling with temperature, top_p, top_k and a seed: of :data:`FEATURES`."""
    files: tuple[ModelFile, ...] = ()
    """What makes the tokenizer and the chat template: of each name one at most."""
    aliases: tuple[str, ...] = field(default=(), compare=False)
    """More names that requests may carry. They say nothing of the model: cards that differ in them alone are equal."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names that requests may carry, `model` first."""
        return (self.model, *self.aliases)

    def served_as(self, names: "tuple[str, ...]") -> "ModelCard":
        """The same model under other names; under its own if there are none."""
        return replace(self, model=names[0], aliases=names[1:]) if names else self

    def to_wire(self) -> dict[str, Any]:
        """Plain data for :meth:`from_wire`."""
        return asdict(self)

    @classmethod
    def from_wire(cls, data: Any) -> "ModelCard":
        """The card in a peer's hello. Unknown fields are ignored; missing or mistyped ones raise ProtocolError."""
        if not isinstance(data, dict):
            raise ProtocolError("a model card is a map")
        values = {}
        for known in fields(cls):
            if known.name in _STRUCTURED:
                continue
            value = data.get(known.name)
            expected: Any = {str: str, int: int}[known.type]  # type: ignore[index]  # all other fields are plain types
            if not isinstance(value, expected) or (known.type is int and (isinstance(value, bool) or not 1 <= value < 2**40)):
                raise ProtocolError(f"the model card's {known.name} is missing or malformed")
            values[known.name] = value
        aliases = _texts(data, "aliases")
        if len(aliases) > MAX_ALIASES:
            raise ProtocolError("the model card has too many aliases")
        return cls(
            **values,
            sampling_defaults=SamplingDefaults.from_wire(data.get("sampling_defaults", {})),
            features=tuple(name for name in _texts(data, "features") if name in FEATURES),
            files=_files(data.get("files", [])),
            aliases=aliases,
        )


_STRUCTURED = ("sampling_defaults", "features", "files", "aliases")


def _texts(data: dict[str, Any], name: str) -> tuple[str, ...]:
    """A field that other peers may leave out."""
    texts = data.get(name, [])
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ProtocolError(f"the model card's {name} are malformed")
    return tuple(texts)


def _files(data: Any) -> tuple[ModelFile, ...]:
    """Those whose names are known here; a newer peer may name others too."""
    if not isinstance(data, (list, tuple)) or len(data) > 16:
        raise ProtocolError("the model card's files are malformed")
    found = [file for file in map(ModelFile.from_wire, data) if file.name in FILE_NAMES]
    if len({file.name for file in found}) != len(found):
        raise ProtocolError("the model card names a file twice")
    return tuple(found)
