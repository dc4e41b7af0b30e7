"""Which block holds which tokens: full blocks are found again by a hash of all tokens up to their end."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

BlockKey = bytes
"""Names a block's contents: a hash of its own tokens and the key of the block before it."""

KEY_BYTES = 16


def first_key(seed: bytes) -> BlockKey:
    """What the key of a sequence's first block is chained to; `seed` names what else the contents follow."""
    return hashlib.blake2b(seed, digest_size=KEY_BYTES).digest()


def next_key(before: BlockKey, tokens: Sequence[int]) -> BlockKey:
    """The key of the block with these tokens behind the block `before`."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=KEY_BYTES).digest()


class PrefixCache:
    """Finds blocks by their keys. It holds none: a block stays until its manager has use for it."""

    def __init__(self) -> None:
        self._blocks: dict[BlockKey, int] = {}
        self._keys: dict[int, BlockKey] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def find(self, keys: Sequence[BlockKey]) -> list[int]:
        """The blocks of the longest prefix of `keys` that is known."""
        found = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def insert(self, block: int, key: BlockKey) -> None:
        """`block` holds the contents `key` from now on. The first block with the same contents stays."""
        if key not in self._blocks and block not in self._keys:
            self._blocks[key] = block
            self._keys[block] = key

    def remove(self, block: int) -> None:
        """The contents of `block` are no more."""
        del self._blocks[self._keys.pop(block)]
