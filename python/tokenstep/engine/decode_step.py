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


class Places:
    """The inputs of decode steps: a step of B places has the first B, so that steps of all sizes share them.

    Args:
        state: of the slots that are put in the places.

    Attributes:
        rows: int32 [max_batch], the slot in each place.
        slots: the same, int64.
        grows: int32 [max_batch], tokens that each place computes: 1, or 0 for an idle one.
        tokens: int64 [max_batch].
        seq_lens: int32 [max_batch].
        block_table: int32 [max_batch, max_blocks].
    """

    def __init__(self, state: SlotState) -> None:
        device, max_batch = state.lengths.device, state.max_batch
        self.rows = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self.slots = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.grows = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self.block_table = torch.zeros_like(state.tables[:max_batch])


class DecodeStep:
    """Computes the next token of up to `size` sequences.

    Args:
        size: places.
        model: the decoder.
        vocab_size: the first ids of the model, which may be drawn.
        cache: the KV cache.
        state: what it advances.
        places: its inputs.
        sampler: has a row for each slot of `state`, idle ones too.
        results: where the drawn tokens go.
        room: for what a pass computes in between.
        capture: for a GPU; None: the step is called as it is.

    Attributes:
        size: places.
        batch: what the model computes.
        rows: int32 [size], the slot in each place.
    """

    def __init__(
        self,
        size: int,
        model: DecoderModel,
        vocab_size: int,
        cache: KVCache,
        state: SlotState,
        places: Places,
        sampler: Sampler,
        results: Results,
        room: Workspace,
        capture: Capture | None = None,
    ) -> None:
        self.size = size
        self._model = model
        self._vocab_size = vocab_size
        self._cache = cache
        self._state = state
        self._sampler = sampler
        self._room = room
        self._out = results.out(size)
        self.rows = places.rows[:size]
        self._slots = places.slots[:size]
        self._grows = places.grows[:size]
        self.batch = ForwardBatch(places.tokens[:size], places.block_table[:size], places.seq_lens[:size])
        self.place([])
        self._replay = None if capture is None else capture(self._compute)

    def place(self, slots: Sequence[int], adapters: AdapterRows | None = None) -> None:
        """Whose tokens the next steps compute, until another step's places are taken; the rest is idle.

        `adapters`: what changes the model in these places. A step with adapters isn't captured.
        """
        idle = self._state.idle(self.size - len(slots))
        self.rows.copy_(stage([*slots, *idle], torch.int32, self.rows.device), non_blocking=True)
        self._slots.copy_(self.rows)
        self._grows.copy_(self.rows < self._state.max_batch)
        self.batch.adapters = adapters

    def run(self) -> None:
        """Computes a step; on a GPU has it computed, and returns at once."""
        if self._replay is None or self.batch.adapters is not None:
            self._compute()
        else:
            self._replay()

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
