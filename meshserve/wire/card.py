"""The card on which a worker says what it serves: model, tokenizer and KV layout. It travels in every hello."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from meshserve.errors import ProtocolError

FEATURES = ("logprobs", "penalties", "logit_bias", "json_schema", "tools")
"""`json_schema`: output that is valid under a schema; `tools`: it may call them. Requests for what a model cannot do are refused."""


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
    """Which tokenizer the processor must use; `bytes` is the dummy model's own."""
    chat_template: str
    """Jinja, as in a model's `tokenizer_config.json`; rendered by the processor."""
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
            if field.name == "features":
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
        return cls(**values, features=tuple(name for name in features if name in FEATURES))
