"""KV blocks as numbers: chained hashes, the block pool, the prefix index. Pure, no bytes of any cache."""
