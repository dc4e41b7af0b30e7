"""What the device keeps of each slot of the batch between steps, so that a step needs nothing of the host.

The host sends what changes and nothing else: a length when a slot is taken, blocks as they are added. All of
it is ordered by the device's stream: a change that is sent behind a step is seen by the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stage(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values in memory of the host from which they can be copied to `device` without waiting.

    For a GPU it is pinned memory of torch's, which hands it out again only when such copies have been done.
    """
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")


def upload(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor on `device`, without waiting for it."""
    return stage(values, dtype, device).to(device, non_blocking=True)


class SlotState:
    """Lengths, last tokens and block tables by slot.

    Behind the slots of sequences there are as many that nobody ever gets: the idle places of a padded batch
    have one each. Their length is 0, so that attention reads and writes nothing for them.

    Args:
        max_batch: sequences that decode together.
        max_blocks: blocks of the longest sequence.
        device: where the model is.

    Attributes:
        lengths: int32 [2 max_batch], tokens in the cache.
        tokens: int64 [2 max_batch], the last one drawn: the next to be computed.
        tables: int32 [2 max_batch, max_blocks].
    """

    def __init__(self, max_batch: int, max_blocks: int, device: torch.device) -> None:
        self.max_batch = max_batch
        self.lengths = torch.zeros(2 * max_batch, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(2 * max_batch, dtype=torch.int64, device=device)
        self.tables = torch.zeros((2 * max_batch, max_blocks), dtype=torch.int32, device=device)

    def idle(self, count: int) -> range:
        """Slots for `count` idle places."""
        return range(self.max_batch, self.max_batch + count)

    def set_length(self, slot: int, length: int) -> None:
        """The sequence in `slot` has so many tokens in the cache."""
        self.lengths.narrow(0, slot, 1).fill_(length)

    def set_table(self, slot: int, blocks: Sequence[int], begin: int) -> None:
        """The blocks of `slot` from index `begin` on."""
        staged = stage(blocks, torch.int32, self.tables.device)
        self.tables[slot, begin : begin + len(blocks)].copy_(staged, non_blocking=True)

    def take_drawn(self, slots: Tensor, drawn: Tensor) -> None:
        """Each of `slots`, int64 [B], goes on with the token it has drawn, int64 [B].

        A row that could not be sampled has drawn -1; until the host knows, it goes on with token 0.
        """
        self.tokens.index_copy_(0, slots, drawn.clamp(min=0))
