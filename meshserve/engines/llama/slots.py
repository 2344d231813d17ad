"""Which sequence of the llama.cpp context holds which KV blocks. Pure: it decides, and returns what the engine's thread is to do.

A slot is a sequence id of the context. A running sequence, or a reservation, has a slot of its own, and shares the cells of cached blocks
with the slots that hold them: nothing is copied. When the sequence ends, its slot stays as a *cached chain* for as long as the pool keeps
blocks of it. The pool evicts blocks from a chain's tail, since a hole in the middle would go unnoticed; when slots run out before
cells, the least recently used chain goes whole.
"""

from collections.abc import Iterable
from typing import Any, Protocol

from meshserve.errors import PoolFull
from meshserve.kv.pool import BlockPool

Operation = tuple[Any, ...]
"""The name of a method of :class:`~meshserve.engines.llama.context.LlamaContext`, and its arguments."""
_FEWEST_RELEASED, _MOST_REMOVED = 256, 1024
"""Removed cells are released when nothing runs and there are so many; when sequences run, from the larger number on, or an eighth of the
pool if that is less. More makes every step dearer (5 % a thousand for a model of 135M), fewer moves running sequences more often."""


def num_spare_cells(num_blocks: int, block_size: int, max_step_tokens: int) -> int:
    """Cells beyond those of the pool's blocks: for removed ones until they are released, for a step, and to move what runs into.

    In a pool that holds all it can, cells are released in time as long as running sequences hold no more than the spare ones.
    """
    return 3 * _most_removed(num_blocks, block_size) + max_step_tokens


def _most_removed(num_blocks: int, block_size: int) -> int:
    return min(_MOST_REMOVED, num_blocks * block_size // 8)


class Owner(Protocol):
    """A sequence or a reservation: it has blocks as long as it lives."""

    blocks: list[int]
    state: Any
    """Its slot."""


class Slot:
    """One sequence id, and the blocks that it holds, by their place in the sequence."""

    __slots__ = ("blocks", "num_written", "number", "owner", "used")

    def __init__(self, number: int) -> None:
        self.number = number
        self.num_written: int | None = 0
        """Of a reservation: tokens that are there, or will be when what is queued is done; None once blocks came out of order."""
        self.blocks: dict[int, int] = {}
        self.owner: Owner | None = None
        self.used = 0

    @property
    def is_chain(self) -> bool:
        """Nobody runs in it: it only keeps blocks for later prompts."""
        return self.owner is None or not self.owner.blocks or self.owner.state is not self


class Slots:
    """All sequence ids but the scratch one."""

    def __init__(self, num_slots: int, pool: BlockPool, block_size: int) -> None:
        self._pool, self._block_size = pool, block_size
        self._free = [Slot(number) for number in reversed(range(num_slots))]
        self._used: dict[Slot, None] = {}
        self._holders: dict[int, dict[Slot, int]] = {}
        """Of each block, the slots that hold it, and its place there."""
        self.can_move, self.moves_whole = True, False
        """Whether blocks can be cut out of a sequence and put back; whether only all of a sequence can."""
        self._operations: list[Operation] = []
        self._num_opened = 0
        self._epoch = 0
        self._epochs: dict[int, int] = {}
        """Of each block, how often removed cells had been released when its cells were taken."""
        self._num_removed = 0
        pool.on_freed = self.freed

    @property
    def num_operations(self) -> int:
        """Those that wait to be taken."""
        return len(self._operations)

    def take_operations(self) -> list[Operation]:
        """What is to be done, in order, before whatever the engine's thread does next."""
        found, self._operations = self._operations, []
        return found

    @property
    def num_available(self) -> int:
        """Slots that are free, or chains."""
        return len(self._free) + sum(slot.is_chain for slot in self._used)

    def release_removed(self) -> None:
        """Have removed cells released, if there are many; called before a step's new sequences are opened.

        Attention adds up in the order of cells, so a sequence's cells must follow each other as its positions do, or its logits change.
        New cells are taken in ascending order as long as none is released. After a release they begin at the lowest free cell: sequences
        that run are moved there, and blocks of earlier times are moved when a sequence goes on from them.
        """
        running = [slot for slot in self._used if not slot.is_chain]
        computed = [getattr(slot.owner, "num_computed", slot.num_written) for slot in running]
        if not self.can_move or None in computed:
            return
        most = _most_removed(self._pool.num_blocks, self._block_size) if running else _FEWEST_RELEASED
        if self._num_removed < most:
            return
        self._operations.append(("release_removed",))
        self._epoch += 1
        for slot, num_tokens in zip(running, computed, strict=True):
            assert num_tokens is not None
            self._bring_forward(slot, -(-num_tokens // self._block_size), num_tokens)
        self._num_removed = 0  # what was just moved is not counted, or sequences that hold more than the bound would move in every step

    def _bring_forward(self, slot: Slot, num_blocks: int, num_tokens: int) -> None:
        """Move those of the slot's first blocks, which hold so many tokens, that are of an earlier time, and all that follow these."""
        if self.moves_whole and num_tokens:
            self._operations.append(("move", (slot.number,), 0, num_tokens))
            return
        size, is_moving = self._block_size, False
        for index in range(num_blocks):
            block = slot.blocks[index]
            is_moving = is_moving or self._epochs[block] < self._epoch
            if is_moving:
                self._epochs[block] = self._epoch
                holders = tuple(holder.number for holder in self._holders[block])
                self._operations.append(("move", holders, index * size, min(size, num_tokens - index * size)))
                self._num_removed += size

    def open(self, owner: Owner, num_prefix_blocks: int) -> Slot:
        """A slot for a sequence whose first blocks are cached ones. Raises PoolFull if all slots are in use."""
        prefix = owner.blocks[:num_prefix_blocks]
        if not self._free:
            self._evict_chain({*prefix})
        slot = self._free.pop() if self._free else self._adopt(prefix)
        slot.owner, slot.num_written = owner, num_prefix_blocks * self._block_size
        self._used[slot] = None
        for index, block in enumerate(prefix):
            if index not in slot.blocks:
                source = next(iter(self._holders[block]))
                self._share(source, slot, index)
                self._touch(source)
        slot.blocks = dict(sorted(slot.blocks.items()))
        self._bring_forward(slot, num_prefix_blocks, num_prefix_blocks * self._block_size)
        self.extend(slot, owner.blocks)
        self._touch(slot)
        return slot

    def extend(self, slot: Slot, blocks: list[int]) -> None:
        """The sequence has got more blocks."""
        for index in range(len(slot.blocks), len(blocks)):
            self._hold(slot, index, blocks[index])

    def freed(self, blocks: Iterable[int]) -> None:
        """The pool gives these blocks to others from now on: their cells are freed."""
        for block in blocks:
            self._epochs.pop(block, None)
            for slot, index in self._holders.pop(block, {}).items():
                del slot.blocks[index]
                self._remove(slot, index)

    def _touch(self, slot: Slot) -> None:
        self._num_opened += 1
        slot.used = self._num_opened

    def _hold(self, slot: Slot, index: int, block: int) -> None:
        slot.blocks[index] = block
        self._holders.setdefault(block, {})[slot] = index
        self._epochs.setdefault(block, self._epoch)

    def _share(self, source: Slot, target: Slot, index: int) -> None:
        first, end = index * self._block_size, (index + 1) * self._block_size
        self._hold(target, index, source.blocks[index])
        operation = ("share", source.number, target.number)
        if self._operations and self._operations[-1][:3] == operation and self._operations[-1][4] == first:
            first = self._operations.pop()[3]  # one call for blocks that follow each other: each looks at all cells
        self._operations.append((*operation, first, end))

    def _remove(self, slot: Slot, index: int) -> None:
        self._num_removed += self._block_size
        if slot.blocks:
            self._operations.append(("remove", slot.number, index * self._block_size, (index + 1) * self._block_size))
            return
        self._operations.append(("remove", slot.number))
        slot.owner = None
        self._used.pop(slot, None)
        self._free.append(slot)

    def _evict_chain(self, needed: set[int]) -> None:
        """The least recently used chain whose blocks nobody holds, or others hold as well, loses all of them; none if there is no such."""
        for slot in self._chains():
            if needed.isdisjoint(self._alone(slot.blocks.values())) and self._drop(slot, slot.blocks.copy()):
                return

    def _adopt(self, prefix: list[int]) -> Slot:
        """A chain that a sequence goes on from becomes the sequence's own slot, and loses what follows. Raises PoolFull if others hold
        that."""
        for slot in self._chains():
            rest = {index: block for index, block in slot.blocks.items() if prefix[index : index + 1] != [block]}
            if len(rest) < len(slot.blocks) and self._drop(slot, rest):
                return slot
        raise PoolFull("all sequences of the KV cache are in use")

    def _chains(self) -> list[Slot]:
        return sorted((slot for slot in self._used if slot.is_chain), key=lambda slot: slot.used)

    def _alone(self, blocks: Iterable[int]) -> list[int]:
        return [block for block in blocks if len(self._holders[block]) == 1]

    def _drop(self, slot: Slot, blocks: dict[int, int]) -> bool:
        """Take these from a chain; those that only it has are evicted. False, and nothing has changed, if somebody holds one of them."""
        if not self._pool.evict(self._alone(blocks.values())):
            return False
        for index, block in blocks.items():
            if index in slot.blocks:  # else it went with the eviction
                del self._holders[block][slot], slot.blocks[index]
                self._remove(slot, index)
        return True
