"""Who holds which block of the KV cache: free blocks, and a reference count for each that is held.

A full block can be given a key. When nobody holds it any more it is free but keeps its contents, and whoever
asks for the key gets it back, until its place is needed: first go blocks without contents, then the least
recently used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from tokenstep.engine.prefix_cache import BlockKey, PrefixCache

BlockTable = list[int]
"""The blocks of one sequence in order: token i lies in block table[i // block_size]."""


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free."""


class BlockManager:
    """Hands out blocks and counts their holders. Before a table writes to a block it must make it writable.

    Args:
        num_blocks: blocks of the cache, ids 0 … num_blocks − 1.
        block_size: tokens in a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blank = list(range(num_blocks - 1, -1, -1))  # taken from the end: low ids first
        self._reusable: OrderedDict[int, None] = (
            OrderedDict()
        )  # free with contents, least recently used first
        self._cache = PrefixCache()
        self._holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, with contents or without."""
        return len(self._blank) + len(self._reusable)

    @property
    def num_reusable(self) -> int:
        """Free blocks whose contents can still be asked for."""
        return len(self._reusable)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def holders(self, block: int) -> int:
        """Tables that `block` is in."""
        return self._holders[block]

    def grow(self, table: BlockTable, num_tokens: int) -> None:
        """Appends free blocks until `table` has room for `num_tokens`; raises OutOfBlocks and takes none."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > self.num_free:
            raise OutOfBlocks(f"tokenstep.engine: {missing} blocks are needed, {self.num_free} are free")
        for _ in range(missing):
            table.append(self._take())

    def fork(self, table: BlockTable) -> BlockTable:
        """A second table over the same blocks."""
        for block in table:
            self._holders[block] += 1
        return list(table)

    def make_writable(self, table: BlockTable, position: int) -> tuple[int, int] | None:
        """Gives `table` a block of its own for token `position`.

        Returns (source, copy) if the block was shared: the caller copies the contents; None if it was the
        table's own.
        """
        index = position // self.block_size
        block = table[index]
        if self._holders[block] == 1:
            return None
        if not self.num_free:
            raise OutOfBlocks("tokenstep.engine: a block is needed, none is free")
        table[index] = self._take()
        self._holders[block] -= 1
        return block, table[index]

    def remember(self, block: int, key: BlockKey) -> None:
        """`block`, which is held, is full and will not be written again: its contents can be had by `key`."""
        self._cache.insert(block, key)

    def reuse(self, keys: Sequence[BlockKey]) -> BlockTable:
        """A table of the blocks that hold the longest known prefix of `keys`."""
        table = self._cache.find(keys)
        for block in table:
            if not self._holders[block]:
                del self._reusable[block]
            self._holders[block] += 1
        return table

    def free(self, table: BlockTable) -> None:
        """Gives up the table's hold on its blocks and empties it."""
        for block in reversed(table):  # a sequence's end goes before what it continues
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._cache:
                    self._reusable[block] = None
                else:
                    self._blank.append(block)
        table.clear()

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._reusable.popitem(last=False)
            self._cache.remove(block)
        self._holders[block] = 1
        return block
