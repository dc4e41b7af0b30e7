"""Capture of a step in a CUDA graph: all that the engine does on a GPU alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UPS = 2  # before a capture libraries choose kernels and take the memory that they keep


class GraphCapture:
    """Captures steps that are replayed on one stream, one after the other, and so share their memory.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: tuple[int, int] | None = None

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Runs `step` to warm up, captures it, and returns what replays it on torch's current stream.

        Every tensor that `step` reads or writes and doesn't make itself must stay at its address.
        """
        with torch.cuda.device(self._device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    step()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # what other threads do on the GPU meanwhile is no part of it
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step()
            self._pool = graph.pool()
        return graph.replay
