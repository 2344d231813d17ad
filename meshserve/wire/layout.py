"""The KV layout of a worker: what two KV caches must share before their workers exchange blocks. It travels in every hello."""

from dataclasses import asdict, dataclass
from typing import Any

from meshserve.errors import ProtocolError

_MAX_BLOCK_TOKENS = 1 << 20
_MAX_BYTES_PER_TOKEN = 1 << 40


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Workers exchange KV blocks only if their fingerprints are equal and neither refuses."""

    fingerprint: str
    """Digest over all that makes the meaning of a block's bytes: model, library and its build, element types, rows, block size."""
    block_size: int
    """Tokens per block."""
    bytes_per_token: int
    """KV bytes of all layers for one token, for costs. Blocks may have a header besides, so blocks are never counted with it."""
    refusal: str = ""
    """Why this worker neither gives out nor takes in KV blocks; empty: it does."""
    numerics: str = ""
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

    def to_wire(self) -> dict[str, Any]:
        """Plain data for :meth:`from_wire`."""
        return asdict(self)

    @classmethod
    def from_wire(cls, data: Any) -> "KVLayout":
        """The layout in a peer's hello. Unknown fields are ignored; missing or mistyped ones raise ProtocolError."""
        get = data.get if isinstance(data, dict) else {}.get
        texts = [get("fingerprint"), get("refusal", ""), get("numerics", "")]
        block_size, bytes_per_token = get("block_size"), get("bytes_per_token")
        if not all(isinstance(text, str) and len(text) <= 512 for text in texts):
            raise ProtocolError("a KV layout is named by a fingerprint")
        if type(block_size) is not int or not 1 <= block_size <= _MAX_BLOCK_TOKENS:
            raise ProtocolError("a KV layout's block size is missing or out of range")
        if type(bytes_per_token) is not int or not 0 <= bytes_per_token < _MAX_BYTES_PER_TOKEN:
            raise ProtocolError("a KV layout's bytes per token are missing or out of range")
        return cls(texts[0], block_size, bytes_per_token, texts[1], texts[2])
