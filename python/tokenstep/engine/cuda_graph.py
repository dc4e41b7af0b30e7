"""What the engine does on a GPU alone: the capture of a step in a CUDA graph, and the mark behind a copy."""

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
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Runs `step` to warm up, captures it, and returns what replays it on torch's current stream.

        Every tensor that `step` reads or writes and doesn't make itself must stay at its address.
        """
        with torch.cuda.device(self._device):
            current, side = torch.cuda.current_stream(), self._side
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    step()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # "thread_local": what other threads do on a GPU meanwhile doesn't break it off
            with torch.cuda.graph(graph, self._pool, side, capture_error_mode="thread_local"):
                step()
        return graph.replay


def mark(device: torch.device) -> torch.cuda.Event:
    """An event behind all that torch's current stream of `device` has been given."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
