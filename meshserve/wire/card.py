"""What a worker serves: the model card with its files, and the KV layout. Both travel in every hello."""

from typing import Annotated

from msgspec.structs import force_setattr

from meshserve.errors import ProtocolError
from meshserve.wire.generation import SamplingDefaults
from meshserve.wire.structs import Count, Figure, FrozenMap, Meta, Row, asdict, replace

FEATURES = ("logprobs", "penalties", "logit_bias", "json_schema", "regex", "tools", "tool_text")
"""`json_schema`, `regex`: output that is valid under a schema, or matches an expression; `tools`: it calls one where it is made to by a
schema; `tool_text`: it writes calls and reasoning as text. Requests for what a model cannot do are refused."""

FILE_NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
"""Files of a Hugging Face model directory that a card may name. A name from the network is only compared with these."""
MAX_ALIASES = 16
"""More names of one model are refused: each is an entry of `/v1/models`."""
MAX_FILE_BYTES = 64 * 1024 * 1024
"""The longest file; the largest `tokenizer.json` of today has 33 MB. Higher lets one hostile card cost that much memory and disk."""


class ModelFile(FrozenMap, frozen=True):
    """A file of the model that the processor needs, by its contents. Workers give it out over the mesh."""

    name: str
    """Of :data:`FILE_NAMES`."""
    size_bytes: Annotated[int, Meta(ge=0, le=MAX_FILE_BYTES)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    """Of its contents, in hexadecimal digits: names the file in requests, and checks it."""


_NUM_DIGITS = 8


def short(digest: str) -> str:
    """The end of a hash or fingerprint, enough to tell a few apart: some begin with the engine's name."""
    return digest.rpartition("/")[2][:_NUM_DIGITS]


def exact_name(name: str, model_hash: str) -> str:
    """What clients call the model of this hash, where several models have that name."""
    return f"{name}#{short(model_hash)}"


class ModelCard(FrozenMap, frozen=True):
    """What a worker's engine serves. Which workers exchange KV blocks, their :class:`KVLayout` says."""

    model: str
    """The name that requests carry."""
    model_hash: str
    """Digest over all that makes the model's output: equal hashes, equal tokens."""
    context_length: Annotated[int, Meta(ge=1, lt=2**40)]
    """Prompt and output together, in tokens: the lesser of what the model reads and what this worker's KV cache holds. Workers of one model
    may differ in it."""
    tokenizer: str
    """Which tokenizer the processor must use: `bytes` is the dummy model's own, `huggingface` is made of `files`."""
    chat_template: str
    """Jinja, rendered by the processor, for a model whose files hold none. Empty: those do, or it has none."""
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    features: tuple[str, ...] = ()
    """What the engine can do beyond sampling with temperature, top_p, top_k and a seed: of :data:`FEATURES`."""
    files: Annotated[tuple[ModelFile, ...], Meta(max_length=16)] = ()
    """Files of the tokenizer and the chat template, at most one of each name."""
    aliases: Annotated[tuple[str, ...], Meta(max_length=MAX_ALIASES)] = ()
    """More names that requests may carry. They say nothing of the model: cards that differ in them alone are equal."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names that requests may carry, `model` first."""
        return (self.model, *self.aliases)

    @property
    def exact_names(self) -> tuple[str, ...]:
        """Those that no other model answers to."""
        return tuple(exact_name(name, self.model_hash) for name in self.names)

    def is_called(self, name: str) -> bool:
        """Whether requests may carry this name for this model."""
        return name in self.names or ("#" in name and name in self.exact_names)

    @property
    def text(self) -> tuple[str, str, tuple[ModelFile, ...]]:
        """What decides how the model reads and writes text: where it is equal, so are the tokens of a prompt."""
        return self.tokenizer, self.chat_template, self.files

    def served_as(self, names: "tuple[str, ...]") -> "ModelCard":
        """The same model under other names; under its own if there are none."""
        return replace(self, model=names[0], aliases=names[1:]) if names else self

    def within(self, num_tokens: int) -> "ModelCard":
        """The same model at a worker whose KV cache holds so many tokens: no request there can have more."""
        return self if self.context_length <= num_tokens else replace(self, context_length=max(1, num_tokens))

    def _check(self) -> None:
        """A newer peer's card may name files and features that are unknown here."""
        force_setattr(self, "features", tuple(name for name in self.features if name in FEATURES))
        force_setattr(self, "files", tuple(file for file in self.files if file.name in FILE_NAMES))
        if len({file.name for file in self.files}) != len(self.files):
            raise ProtocolError("malformed ModelCard: it names a file twice")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelCard) and asdict(replace(self, aliases=())) == asdict(replace(other, aliases=()))

    def __hash__(self) -> int:
        return hash(self.model_hash)


_Text = Annotated[str, Meta(max_length=512)]


class KVLayout(FrozenMap, frozen=True):
    """Workers exchange KV blocks only if their fingerprints are equal and neither refuses."""

    fingerprint: _Text
    """Digest over all that makes the meaning of a block's bytes: model, library and its build, element types, rows, block size."""
    block_size: Annotated[int, Meta(ge=1, le=1 << 20)]
    """Tokens per block."""
    bytes_per_token: Figure
    """KV bytes of all layers for one token, for costs. Blocks may have a header besides, so blocks are never counted with it."""
    refusal: _Text = ""
    """Why this worker neither gives out nor takes in KV blocks; empty: it does."""
    numerics: _Text = ""
    """The class of processor and backend. Workers of two classes take each other's blocks, with outputs that are close but not equal."""

    @property
    def can_hand_over(self) -> bool:
        """Whether KV blocks can leave or come at all."""
        return not self.refusal

    @property
    def block_bytes(self) -> int:
        """Bytes of one full KV block, without any header."""
        return self.block_size * self.bytes_per_token

    def accepts(self, other: "KVLayout | None") -> bool:
        """Whether blocks of a worker with the `other` layout are of use here."""
        return other is not None and self.fingerprint == other.fingerprint and self.can_hand_over and other.can_hand_over


class FilePartRequest(Row):
    """The part of a file that begins at this byte."""

    sha256: str
    """Of the whole file."""
    offset: Count
