"""Memory that costs nothing until it is written: a cache for 32 full contexts is mostly never touched."""

from __future__ import annotations

import math
import mmap
import threading

import torch

ALIGNMENT = 64
SLAB = 64 << 20


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Zeros. On a CPU the system provides a page when it is first written; `torch.zeros` writes them all."""
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or not size:
        plain = torch.uint8 if dtype.itemsize == 1 else dtype  # float8 has few operations
        return torch.zeros(shape, dtype=plain, device=device).view(dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class HugePages:
    """Room on the CPU for what is read in long streams, such as weights.

    With pages of 4 KiB a core waits for translations of addresses, and its prefetcher stops at each end. The
    system is asked for pages of 2 MiB; matrices share them, one behind the other.
    """

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> torch.Tensor:
        """Uint8 [size] from a multiple of 64 on, of any contents. It lives as long as it is referred to."""
        with self._lock:
            if self._used + size > len(self._slab):
                pages = mmap.mmap(-1, max(size, SLAB), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    pages.madvise(mmap.MADV_HUGEPAGE)
                self._slab, self._used = torch.frombuffer(pages, dtype=torch.uint8), 0
            part = self._slab[self._used : self._used + size]
            self._used += -(-size // ALIGNMENT) * ALIGNMENT
            return part
