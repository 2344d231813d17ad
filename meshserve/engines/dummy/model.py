"""The dummy model: a KV cache of real bytes, digests of them that stand for what a model would attend to, and the tokens that follow.

The KV row of a token is a function of the token and of the digest of all KV contents before it; a block's digest is seeded with
the digest of the block before. Every digest is taken from the bytes as they were stored or received, once, when they become
visible: from there on a corrupted, stale or missing block changes every row and token that follows.

A row repeats a seed of 16 bytes. Seeds are kept, 1.5 % of what they stand for, and rows are made of them when somebody reads a block.
A row that came from elsewhere and does not repeat is its own seed. A block that is being written is a list of seeds, to which one more
costs a fifth of what it costs in a bytearray (0.02 us of 0.1); a full one is their bytes, which the garbage collector does not walk.

The last layer makes a few candidates of the digest, their logits, and a draw among them. The words of one part of speech, ranked from
a place that the digest names, have the logits 0, -0.4, -0.8 and so on; where a text ends, the end of sequence has 0 and they have 6
less. Every other token of the vocabulary has -50. Tokens more than 30 below the best one are never drawn, at any temperature: so bytes
and words that do not fit come up only where a bias or a penalty says so.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from math import exp, inf, log
from struct import Struct

import xxhash

from meshserve.engines.tokenizers import EOS_TOKEN, WORD_RANGES
from meshserve.wire.generation import Sampling

_SEED_BYTES = 16
_NOT_WRITTEN = 0x6E6F_7468_696E_6721
"""Stands for the digest of a block that holds nothing yet: whoever reads it gets other tokens, not an error."""
_pack_state = Struct("<QI").pack
_digest = xxhash.xxh3_128_digest


class KVContents:
    """Bytes and digests by block number; memory is taken when a block is first used, and kept."""

    def __init__(self, block_size: int, kv_bytes_per_token: int, salt: str) -> None:
        self.block_size = block_size
        self.kv_bytes_per_token = kv_bytes_per_token
        self.repeats = -(-kv_bytes_per_token // _SEED_BYTES)
        """Of a seed in a row, the last of them perhaps cut."""
        self.root = xxhash.xxh3_64_intdigest(salt.encode())
        self.seeds: dict[int, bytes | list[bytes]] = {}
        """Of a block's rows; those that nobody wrote are left out."""
        self.digests: dict[int, int] = {}
        """Of whole blocks, each with all that stands before it."""

    def read(self, blocks: Iterable[tuple[int, int]]) -> list[bytes]:
        """The first rows of each of these blocks, given as block and number of rows; rows that nobody wrote are zeros."""
        repeats, size, payloads = self.repeats, self.kv_bytes_per_token, []
        for block, num_rows in blocks:
            held, rows = self.seeds.get(block, b""), []
            if isinstance(held, list):
                for seed in held[:num_rows]:
                    rows.append((seed * repeats)[:size])
            else:
                for start in range(0, min(len(held), num_rows * _SEED_BYTES), _SEED_BYTES):
                    rows.append((held[start : start + _SEED_BYTES] * repeats)[:size])
            payloads.append(b"".join(rows).ljust(num_rows * size, b"\0"))
        return payloads

    def write(self, blocks: Iterable[tuple[int, bytes]]) -> None:
        """Take in rows that were computed elsewhere, given as block and payload. They are visible once :meth:`digest` was called."""
        repeats, size = self.repeats, self.kv_bytes_per_token
        for block, payload in blocks:
            self.digests.pop(block, None)
            seeds = []
            for start in range(0, len(payload), size):
                row = payload[start : start + size]
                seed = row[:_SEED_BYTES]
                seeds.append(seed if (seed * repeats)[:size] == row else row)
            joined = b"".join(seeds)
            self.seeds[block] = joined if len(joined) == len(seeds) * _SEED_BYTES else seeds

    def digest(self, blocks: list[int], first: int, end: int, written: Mapping[int, bytes]) -> None:
        """Digest blocks `first` to `end` - 1 of a sequence's blocks, which are full, each from what it holds and the digest before it.

        `written` has the rows of those that were written just now, by index.
        """
        parent = self.parent(blocks, first)
        for index in range(first, end):
            rows = written.get(index)
            if rows is None:
                rows = self.read([(blocks[index], self.block_size)])[0]
            parent = self.digests[blocks[index]] = xxhash.xxh3_64_intdigest(rows, parent)

    def parent(self, blocks: list[int], index: int) -> int:
        """The digest of all that stands before block `index` of a sequence's blocks."""
        return self.digests.get(blocks[index - 1], _NOT_WRITTEN) if index else self.root

    def contexts(self, blocks: list[int], start: int, end: int) -> Iterator[int]:
        """The digest of all rows before token `start`, and before each that follows it, up to `end` - 1: as a cursor found them."""
        size, row_bytes = self.block_size, self.kv_bytes_per_token
        for first in range(start - start % size, end, size):
            context = self.parent(blocks, first // size)
            rows = self.read([(blocks[first // size], size)])[0]
            hasher = xxhash.xxh3_64(seed=context)
            for index in range(min(size, end - first)):
                if first + index >= start:
                    yield context
                hasher.update(rows[index * row_bytes : (index + 1) * row_bytes])
                context = hasher.intdigest()


class Cursor:
    """Where one sequence writes its next KV row. `context` is the digest of all rows before it.

    Opened on `num_tokens` rows that are there; those of a partial last block are digested now, from what it holds. `blocks` is
    the sequence's own list, which may grow meanwhile.
    """

    __slots__ = (
        *("_block_end", "_block_size", "_blocks", "_contents", "_hasher", "_is_cut", "_repeats", "_row_bytes"),
        *("_seeds", "context", "num_tokens"),
    )

    def __init__(self, contents: KVContents, blocks: list[int], num_tokens: int) -> None:
        self._contents, self._blocks = contents, blocks
        self._block_size, self._row_bytes, self._repeats = contents.block_size, contents.kv_bytes_per_token, contents.repeats
        self._is_cut = self._row_bytes % _SEED_BYTES > 0
        self.num_tokens = num_tokens
        """Rows that are there."""
        index, num_rows = divmod(num_tokens, self._block_size)
        self.context = contents.parent(blocks, index) if num_tokens else contents.root
        self._hasher: xxhash.xxh3_64 | None = None
        """None: the next row begins a block."""
        if num_rows:
            self._resume(blocks[index], num_rows)

    def _resume(self, block: int, num_rows: int) -> None:
        """Digest the rows that the block has, and go on with a list of their seeds; a row that nobody wrote is zeros."""
        self._hasher = xxhash.xxh3_64(self._contents.read([(block, num_rows)])[0], seed=self.context)
        self.context = self._hasher.intdigest()
        found = self._contents.seeds.get(block, b"")
        if isinstance(found, bytes):
            found = [found[start : start + _SEED_BYTES] for start in range(0, min(len(found), num_rows * _SEED_BYTES), _SEED_BYTES)]
        self._seeds = self._contents.seeds[block] = found[:num_rows] + [bytes(_SEED_BYTES)] * (num_rows - len(found))
        self._block_end = self.num_tokens - num_rows + self._block_size

    def _enter_block(self) -> "xxhash.xxh3_64":
        num_tokens = self.num_tokens
        self._seeds = self._contents.seeds[self._blocks[num_tokens // self._block_size]] = []
        self._block_end = num_tokens + self._block_size
        self._hasher = hasher = xxhash.xxh3_64(seed=self.context)
        return hasher

    def append(self, token: int) -> None:
        """Compute and store the KV row of the next token."""
        hasher = self._hasher or self._enter_block()
        seed = _digest(_pack_state(self.context, token))
        self._seeds.append(seed)
        row = seed * self._repeats
        hasher.update(row[: self._row_bytes] if self._is_cut else row)
        self.context = hasher.intdigest()
        self.num_tokens = num_tokens = self.num_tokens + 1
        if num_tokens == self._block_end:
            self._complete_block()

    def extend(self, tokens: Sequence[int]) -> None:
        """:meth:`append` for each, with all that it takes at hand: 0.24 us a token instead of 0.38."""
        repeats, row_bytes, is_cut = self._repeats, self._row_bytes, self._is_cut
        place, num_tokens = 0, len(tokens)
        while place < num_tokens:
            hasher = self._hasher or self._enter_block()
            context, keep, update, digest_rows = self.context, self._seeds.append, hasher.update, hasher.intdigest
            end = min(num_tokens, place + self._block_end - self.num_tokens)
            for token in tokens[place:end]:
                seed = _digest(_pack_state(context, token))
                keep(seed)
                row = seed * repeats
                update(row[:row_bytes] if is_cut else row)
                context = digest_rows()
            self.context = context
            self.num_tokens += end - place
            place = end
            if self.num_tokens == self._block_end:
                self._complete_block()

    def _complete_block(self) -> None:
        contents, block = self._contents, self._blocks[self.num_tokens // self._block_size - 1]
        joined = b"".join(self._seeds)  # in one piece, unless a row among them is its own seed
        contents.seeds[block] = joined if len(joined) == self._block_size * _SEED_BYTES else self._seeds
        contents.digests[block] = self.context
        self._hasher = None


# --- the last layer

_PATTERN = (
    "start adjective noun verb determiner noun place determiner adjective noun stop "
    "start noun verb determiner adjective noun comma link determiner noun verb determiner noun stop"
)
_EOS_WINS_BELOW, _EOS_OUT_OF = 3, 14
"""A text may end where a sentence begins, every 12.5 tokens, and does so 3 times in 14: 58 tokens in the mean."""

_LOGIT_STEP = 0.4
"""Between a candidate and the next."""
_EOS_LEAD = 6.0
"""How far the end of sequence leads when it wins; else it is one of the others."""
OTHER_LOGIT = -50.0
"""Of all that is no candidate: a bias of 100 lifts it above every candidate, one of -100 sinks a candidate below it."""
NEVER_DRAWN_BELOW = 30.0
_MOST_KEPT = 64
_pack_draw = Struct("<QQ").pack
_MASK = 2**64 - 1


class Logits:
    """Logits of candidates, best first, and what follows from them. Those more than `most_below` below the best one are never drawn."""

    def __init__(self, values: Sequence[float], most_below: float = inf) -> None:
        self.values, self._most_below = values, most_below
        self._log_total: float | None = None
        self._cumulative: dict[tuple[float, ...], list[float]] = {}

    @property
    def log_total(self) -> float:
        """Logarithm of the sum over the vocabulary of exp(logit). All that is no candidate adds less than a double can hold."""
        if self._log_total is None:
            best = self.values[0]
            self._log_total = best + log(sum([exp(value - best) for value in self.values]))
        return self._log_total

    def draw(self, sampling: Sampling, position: int) -> int:
        """Which candidate is output number `position`: of nothing but (seed, choice, position) and these logits."""
        if sampling.temperature <= 0:
            return 0
        cumulative = self._cumulative.get(sampling.filters)
        if cumulative is None:
            if len(self._cumulative) == _MOST_KEPT:
                self._cumulative.clear()
            cumulative = self._cumulative[sampling.filters] = self._weigh(sampling)
        # the choice is the hash's seed: 0, the only one of most requests, costs nothing
        fraction = xxhash.xxh3_64_intdigest(_pack_draw(sampling.seed & _MASK, position), sampling.choice) / 2**64
        return min(bisect_right(cumulative, fraction * cumulative[-1]), len(cumulative) - 1)

    def _weigh(self, sampling: Sampling) -> list[float]:
        """Running sums of the weights that the filters leave, best candidate first."""
        best, most_below = self.values[0], self._most_below
        weights = [exp((value - best) / sampling.temperature) for value in self.values if best - value <= most_below]
        if (least := sampling.least_weight(lambda: sum(weights))) > 0:
            weights = [weight for weight in weights if weight >= least]
        if sampling.top_k > 0:
            weights = weights[: sampling.top_k]
        sums = list(accumulate(weights))
        enough = sampling.top_p * sum(weights)
        num_kept = next((index + 1 for index, reached in enumerate(sums) if reached >= enough), len(sums))
        return sums[:num_kept]


@lru_cache(maxsize=1024)
def ranked(size: int) -> Logits:
    """Those of so many candidates, none of which is the end of sequence in the lead."""
    return Logits([-rank * _LOGIT_STEP for rank in range(size)])


_ENDING = Logits([0.0] + [value - _EOS_LEAD for value in ranked(len(WORD_RANGES["start"])).values])
"""Those of the end of sequence and the words behind it, where a sentence begins."""
_SLOTS = tuple(
    (WORD_RANGES[part].start, len(WORD_RANGES[part]), ranked(len(WORD_RANGES[part])), _ENDING if part == "start" else None)
    for part in _PATTERN.split()
)
"""By the position in a text: the first of the words that may come, how many, and their logits, also where the text may end."""
_PERIOD = len(_SLOTS)


def next_token(context: int, sampling: Sampling, position: int) -> int:
    """The token that follows KV contents whose digest is `context` (64 bits), as the sequence's output number `position` (from 0).

    For plain requests: penalties, bias and constraints are the Sampler's. The part of speech follows from the position, so that the
    text reads; its words are the candidates, ranked from a place that the digest names. Temperature 0 takes the first. The end of
    sequence is a candidate where sentences begin.
    """
    first, size, logits, ending = _SLOTS[position % _PERIOD]
    if (
        ending is not None
        and (not sampling.ignore_eos and position >= sampling.min_tokens)  # as `may_end`, without a call for each token
        and position
        and (context >> 40) % _EOS_OUT_OF < _EOS_WINS_BELOW
    ):
        rank = ending.draw(sampling, position) - 1
        if rank < 0:
            return EOS_TOKEN
    elif sampling.temperature <= 0:
        return first + context % size
    else:
        rank = logits.draw(sampling, position)
    return first + (context + rank) % size


def candidates(context: int, position: int, can_end: bool) -> tuple[list[int], Logits]:
    """The same candidates as a list, best first, with their logits; `can_end` False keeps the end of sequence out."""
    first, size, logits, ending = _SLOTS[position % _PERIOD]
    best = first + context % size
    words = [*range(best, first + size), *range(first, best)]
    if can_end and ending is not None and position and (context >> 40) % _EOS_OUT_OF < _EOS_WINS_BELOW:
        return [EOS_TOKEN, *words], ending
    return words, logits


def may_end(sampling: Sampling, position: int) -> bool:
    """Whether the end of sequence may be output number `position`."""
    return not sampling.ignore_eos and position >= sampling.min_tokens
