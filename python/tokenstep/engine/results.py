"""From the sampler's results on the device to Python numbers, without waiting where nobody reads yet."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenstep.engine.cuda_graph import mark
from tokenstep.engine.request import TokenLogprobs
from tokenstep.sampling import SampleOutput

MAX_TOP = 20  # top log probabilities that a row may want
STEPS_UNREAD = 2  # results of so many steps may be unread at a time


class LogprobRows:
    """The log probabilities of one sampling step, as Python numbers.

    Args:
        out: of at least `rows` rows, in memory of the CPU.
        rows: those that are wanted.
        top: the most top log probabilities that one of them wants.
    """

    def __init__(self, out: SampleOutput, rows: int, top: int) -> None:
        self.logprobs: list[float] = out.logprobs[:rows].tolist()
        self.ranks: list[int] = out.ranks[:rows].tolist()
        self.top_tokens: list[list[int]] = out.top_tokens[:rows, :top].tolist()
        self.top_logprobs: list[list[float]] = out.top_logprobs[:rows, :top].tolist()

    def entry(self, row: int, top: int) -> TokenLogprobs:
        """Those of `row`, with the `top` most likely ids."""
        return TokenLogprobs(
            self.logprobs[row], self.ranks[row], self.top_tokens[row][:top], self.top_logprobs[row][:top]
        )


@dataclass(slots=True)
class Sampled:
    """The numbers of one sampling step, an entry a row. `logprobs` is None where no row wanted any."""

    tokens: list[int]
    status: list[int]
    logprobs: LogprobRows | None


@dataclass(slots=True)
class Unread:
    """Results on their way to the host. They must be read before `STEPS_UNREAD` further steps are fetched.

    Attributes:
        out: where they arrive.
        arrived: tells when; None if they are there.
        rows: so many are wanted.
        top: the most top log probabilities that one wants; None: no log probabilities.
    """

    out: SampleOutput
    arrived: torch.cuda.Event | None
    rows: int
    top: int | None

    def read(self) -> Sampled:
        """Waits for the numbers, and only for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        logprobs = None if self.top is None else LogprobRows(self.out, self.rows, self.top)
        return Sampled(self.out.tokens[: self.rows].tolist(), self.out.status[: self.rows].tolist(), logprobs)


class Results:
    """Where the sampler writes on the device, and where its results arrive on the host.

    One copy a step brings them over: of tokens and status alone, if nobody wants log probabilities.

    Args:
        max_batch: rows of a step at most.
        device: where the sampler is.
    """

    def __init__(self, max_batch: int, device: torch.device) -> None:
        size = _Layout(max_batch).num_bytes
        pinned = device.type == "cuda"
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._hosts = deque(
            torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(STEPS_UNREAD)
        )
        self._layouts: dict[int, _Layout] = {}
        self._views: dict[tuple[int, int], SampleOutput] = {}  # by place in memory and rows

    def out(self, size: int) -> SampleOutput:
        """What a step of `size` rows writes to; the same memory for all steps."""
        return self._view(self._device, size)

    def fetch(self, size: int, rows: int, top: int | None) -> Unread:
        """Sends the results of a step of `size` rows on their way; see `Unread` for the rest."""
        host = self._hosts[0]
        self._hosts.rotate(-1)
        layout = self._layout(size)
        end = layout.head_bytes if top is None else layout.num_bytes
        host[:end].copy_(self._device[:end], non_blocking=True)
        arrived = mark(self._device.device) if self._device.is_cuda else None
        return Unread(self._view(host, size), arrived, rows, top)

    def _view(self, memory: Tensor, size: int) -> SampleOutput:
        key = memory.data_ptr(), size
        if key not in self._views:
            self._views[key] = self._layout(size).view(memory)
        return self._views[key]

    def _layout(self, size: int) -> _Layout:
        if size not in self._layouts:
            self._layouts[size] = _Layout(size)
        return self._layouts[size]


class _Layout:
    """The fields of `rows` rows behind each other, first what every step gives."""

    def __init__(self, rows: int) -> None:
        self._fields: dict[str, tuple[int, int, torch.dtype, tuple[int, ...]]] = {}
        self.num_bytes = 0
        self._append("tokens", torch.int64, rows)
        self._append("status", torch.int32, rows)
        self.head_bytes = self.num_bytes
        self._append("top_tokens", torch.int64, rows, MAX_TOP)
        self._append("logprobs", torch.float32, rows)
        self._append("ranks", torch.int32, rows)
        self._append("top_logprobs", torch.float32, rows, MAX_TOP)

    def _append(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        begin = -(-self.num_bytes // dtype.itemsize) * dtype.itemsize
        self.num_bytes = begin + dtype.itemsize * torch.Size(shape).numel()
        self._fields[name] = begin, self.num_bytes, dtype, shape

    def view(self, memory: Tensor) -> SampleOutput:
        """The fields in uint8 `memory`."""
        return SampleOutput(
            **{
                name: memory[begin:end].view(dtype).view(shape)
                for name, (begin, end, dtype, shape) in self._fields.items()
            }
        )
