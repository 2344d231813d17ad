"""The KV layout of a worker: what two KV caches must share before their workers exchange blocks. It travels in every hello."""

from typing import Annotated

from meshserve.wire.message import Figure, FrozenMap, Meta

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
