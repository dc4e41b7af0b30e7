"""vLLM's requests as rows of a :class:`tokenstep.Sampler`. It needs nothing of vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tokenstep import _native
from tokenstep.sampling import SampleOutput, Sampler, SamplingParams

__all__ = ["MAX_LOGPROBS", "Batch", "Unsupported", "admit", "new_sampler", "penalised"]

MAX_LOGPROBS = 20
MAX_VOCAB = 1 << 18
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class Unsupported(Exception):
    """The kernel cannot do this step; the message says why."""


@dataclass(eq=False, slots=True)
class _Request:
    """A request in its row.

    Attributes:
        params: its vllm.SamplingParams.
        prompt: ids of its prompt.
        output: vLLM's own list of its output, which grows between steps.
        seed: of its draws; the position of a draw is the number of tokens before it.
        edits: its logits have to be edited in each step before the kernel sees them.
        held: output tokens that the kernel's row holds, or None if that row is not this request's.
    """

    params: Any
    prompt: list[int] | None
    output: list[int]
    seed: int = field(init=False)
    edits: bool = field(init=False)
    held: int | None = None

    def __post_init__(self) -> None:
        p = self.params
        # From torch's generator, which vLLM seeds: an engine that is started again draws the same tokens.
        self.seed = int(torch.randint(-(1 << 63), (1 << 63) - 1, ())) if p.seed is None else p.seed
        self.edits = bool(p.logit_bias or p.allowed_token_ids or p.bad_words_token_ids)


def penalised(params: Any) -> bool:
    """Whether a request with these vllm.SamplingParams has any of the three penalties."""
    given = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    return given != (1.0, 0.0, 0.0)


def new_sampler(max_rows: int, vocab_size: int, device: torch.device) -> Sampler:
    """A sampler by vLLM's rules; raises Unsupported if the kernel has none for this vocabulary or device."""
    if device.type not in ("cpu", "cuda"):
        raise Unsupported(f"the device {device.type}")
    if device.type == "cuda" and (reason := _native.cuda_unusable_because()):
        raise Unsupported(reason)
    if vocab_size > MAX_VOCAB:
        raise Unsupported(f"a vocabulary of {vocab_size}")
    return Sampler(max_rows, vocab_size, device, semantics="vllm")


def admit(
    sampler: Sampler,
    row: int,
    params: Any,
    seed: int,
    prompt: npt.NDArray[np.int64],
    output: npt.NDArray[np.int64],
    logprobs: int | None = None,
) -> None:
    """Puts a request with these vllm.SamplingParams into a row. Ids of its prompt may be no tokens."""
    sampler.admit(
        row,
        SamplingParams(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            # vLLM takes any finite one above 0, and rounds it to 0 or infinity
            repetition_penalty=min(max(params.repetition_penalty, SMALLEST), LARGEST),
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            seed=seed,
            logprobs=logprobs,
        ),
        prompt[(prompt >= 0) & (prompt < sampler.vocab_size)],  # others: places of images
        output,
    )


class Batch:
    """Requests by their row, told of changes as vLLM's logits processors are, and what draws for them.

    A row's parameters and history go to the device when the request enters the row or has gone on without
    the kernel (a step that fell back, a token that vLLM dropped); a step of the same requests as the last one
    sends nothing and, on a GPU, waits for nothing.
    """

    def __init__(self, max_rows: int) -> None:
        """An empty batch of at most ``max_rows`` requests."""
        self._max_rows = max_rows
        self._by_row: dict[int, _Request] = {}
        self._rows: list[_Request] = []
        self._sampler: Sampler | None = None
        self._logprobs: int | None = None

    def update(
        self, removed: Iterable[int], added: Iterable[tuple[int, Any, Any, Any]], moved: Iterable[Any]
    ) -> None:
        """The changes since the last step, in this order; what vLLM's BatchUpdate has.

        Args:
            removed: rows.
            added: row, SamplingParams, ids of the prompt or None, vLLM's list of output ids.
            moved: from row, to row, a MoveDirectionality.
        """
        rows = self._by_row
        for row in removed:
            rows.pop(row, None)
        for row, params, prompt, output in added:
            rows[row] = _Request(params, prompt, output)
        for source, target, direction in moved:
            request, other = rows.pop(source, None), rows.pop(target, None)
            swapped = direction.name == "SWAP"
            for row, one in ((target, request), (source, other if swapped else None)):
                if one is not None:
                    one.held = None
                    rows[row] = one
        # vLLM closes all gaps; should it ever not, prepare finds too few rows.
        self._rows = [rows[row] for row in range(len(rows)) if row in rows]

    def edits(self) -> bool:
        """Whether the logits of a row have to be edited before this step, in ways that vLLM's code knows."""
        return any(one.edits or len(one.output) < one.params.min_tokens for one in self._rows)

    def forget(self) -> None:
        """The next step sends all rows anew: vLLM draws this one."""
        for request in self._rows:
            request.held = None

    def prepare(self, logits: torch.Tensor, logprobs: int | None) -> None:
        """Sends what has changed.

        Args:
            logits: those of the step, ``[B, V]``, a row a request.
            logprobs: as :class:`tokenstep.SamplingParams` takes it, for all rows.

        Raises:
            Unsupported: before anything of this step has happened.
        """
        if len(self._rows) != len(logits):
            raise Unsupported(f"{len(logits)} rows of logits for {len(self._rows)} requests")
        if self._sampler is None or self._sampler.vocab_size != logits.shape[1]:
            self._sampler = new_sampler(self._max_rows, logits.shape[1], logits.device)
            self.forget()
        if logprobs != self._logprobs:
            self._logprobs = logprobs
            self.forget()
        for row, request in enumerate(self._rows):
            if request.held != len(request.output):
                self._admit(self._sampler, row, request)

    def step(self, logits: torch.Tensor) -> SampleOutput:
        """Draws; what was prepared for. A row that cannot be sampled gives token -1 and NaN."""
        assert self._sampler is not None
        out = self._sampler.step(logits)
        for request in self._rows:
            request.held = len(request.output) + 1
        if logits.device.type == "cpu" and out.status.any():
            for row in out.status.nonzero().flatten().tolist():
                self._rows[row].held = None  # vLLM goes on with some token; the kernel's row has not moved
        return out

    def _admit(self, sampler: Sampler, row: int, request: _Request) -> None:
        prompt, output = np.empty(0, np.int64), np.asarray(request.output, np.int64)
        if penalised(request.params):
            if (output < 0).any():
                raise Unsupported("penalties on tokens that are not yet known")
            prompt = np.asarray(request.prompt or (), np.int64)
        else:
            output = np.maximum(output, 0)  # only their number counts: the position of the draw
        admit(sampler, row, request.params, request.seed, prompt, output, self._logprobs)
        request.held = len(request.output)
