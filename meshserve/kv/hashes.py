"""Names for blocks of tokens: a block's hash stands for its whole prefix."""

from array import array
from functools import lru_cache

import xxhash


def block_hashes(tokens: "array[int]", block_size: int, salt: str) -> list[int]:
    """Hashes of the full blocks of `tokens`, in order, as non-negative 64-bit integers.

    Each is xxh3_64 over the block's token bytes, seeded with the hash of the block before it, so that equal hashes mean
    equal prefixes. The first is seeded with the hash of `salt` (the model's hash: equal tokens of two models are not equal KV).
    A partial last block has no hash. The idea of chained block hashes is that of vLLM's automatic prefix caching.
    """
    data = tokens.tobytes()
    size = block_size * tokens.itemsize
    digest = xxhash.xxh3_64_intdigest
    parent = _first_parent(salt)
    hashes = []
    for start in range(0, len(data) - size + 1, size):
        parent = digest(data[start : start + size], parent)
        hashes.append(parent)
    return hashes


def prefix_hashes(tokens: "array[int]", block_size: int, salt: str) -> list[int]:
    """The same, and after them one for a partial last block: each stands for all tokens up to its block's end."""
    hashes = block_hashes(tokens, block_size, salt)
    rest = tokens[len(hashes) * block_size :]
    if rest:
        hashes.append(xxhash.xxh3_64_intdigest(rest.tobytes(), hashes[-1] if hashes else _first_parent(salt)))
    return hashes


@lru_cache(64)  # of models: the same for every request
def _first_parent(salt: str) -> int:
    return xxhash.xxh3_64_intdigest(salt.encode())
