"""A decode step in the shape of a CUDA graph: one function of tensors that stay where they are.

The step takes lengths, tokens and block tables from `SlotState`, computes model, logits and sampler, and puts
lengths and tokens back: the next step needs nothing of the host. On a GPU it is captured once for each batch
size and replayed; elsewhere the same function is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tokenstep.engine.results import Results
from tokenstep.engine.slots import SlotState, stage
from tokenstep.models import AdapterRows, DecoderModel, ForwardBatch, KVCache, Workspace
from tokenstep.sampling import Sampler

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Makes of a step what replays it. It may run the step first: no place of it is taken then."""

FULL_OCTAVE = 8  # batches are padded to 1, 2, 4, 8, and from there on to multiples of it


def padded_size(count: int, max_batch: int) -> int:
    """The places of a batch for `count` sequences: one of few numbers, `max_batch` at most."""
    if count <= FULL_OCTAVE:
        return min(1 << (count - 1).bit_length(), max_batch)
    return min(-(-count // FULL_OCTAVE) * FULL_OCTAVE, max_batch)


class DecodeStep:
    """Computes the next token of up to `size` sequences.

    Args:
        size: places.
        model: the decoder.
        vocab_size: the first ids of the model, which may be drawn.
        cache: the KV cache.
        state: what it advances.
        sampler: has a row for each slot of `state`, idle ones too.
        results: where the drawn tokens go.
        room: for what a pass computes in between.
        capture: for a GPU; None: the step is called as it is.

    Attributes:
        size: places.
        batch: its inputs of the model.
        rows: int32 [size], the slot in each place.
    """

    def __init__(
        self,
        size: int,
        model: DecoderModel,
        vocab_size: int,
        cache: KVCache,
        state: SlotState,
        sampler: Sampler,
        results: Results,
        room: Workspace,
        capture: Capture | None = None,
    ) -> None:
        device = state.lengths.device
        self.size = size
        self._model = model
        self._vocab_size = vocab_size
        self._cache = cache
        self._state = state
        self._sampler = sampler
        self._room = room
        self._out = results.out(size)
        self.rows = torch.zeros(size, dtype=torch.int32, device=device)
        self._slots = torch.zeros(size, dtype=torch.int64, device=device)
        self._grows = torch.zeros(size, dtype=torch.int32, device=device)  # 1, or 0 for an idle place
        self.batch = ForwardBatch(
            tokens=torch.zeros(size, dtype=torch.int64, device=device),
            block_table=torch.zeros((size, state.tables.shape[1]), dtype=torch.int32, device=device),
            seq_lens=torch.zeros(size, dtype=torch.int32, device=device),
        )
        self.place([])
        self._run = self._compute if capture is None else capture(self._compute)

    def place(self, slots: Sequence[int], adapters: AdapterRows | None = None) -> None:
        """Whose tokens the next steps compute; places that are left are idle.

        `adapters`: what changes the model in these places. A step with adapters isn't captured.
        """
        idle = self._state.idle(self.size - len(slots))
        self.rows.copy_(stage([*slots, *idle], torch.int32, self.rows.device), non_blocking=True)
        self._slots.copy_(self.rows)
        self._grows.copy_(self.rows < self._state.max_batch)
        self.batch.adapters = adapters

    def run(self) -> None:
        """Computes a step; on a GPU has it computed, and returns at once."""
        if self.batch.adapters is None:
            self._run()
        else:
            self._compute()

    @torch.inference_mode()
    def _compute(self) -> None:
        state, batch = self._state, self.batch
        torch.index_select(state.tokens, 0, self._slots, out=batch.tokens)
        torch.index_select(state.tables, 0, self._slots, out=batch.block_table)
        torch.index_select(state.lengths, 0, self._slots, out=batch.seq_lens)
        batch.seq_lens += self._grows
        state.lengths.index_copy_(0, self._slots, batch.seq_lens)
        hidden = self._model.forward(batch, self._cache, self._room)
        logits = self._model.logits(hidden)[:, : self._vocab_size]
        self._sampler.step(logits, rows=self.rows, out=self._out)
        state.take_drawn(self._slots, self._out.tokens)
