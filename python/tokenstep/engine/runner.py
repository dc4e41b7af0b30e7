"""Runs model and sampler for the engine: from token ids and block tables to tensors, and back to numbers."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenstep.engine.block_manager import BlockTable
from tokenstep.engine.request import TokenLogprobs
from tokenstep.engine.sequence import Choice, Piece
from tokenstep.models import AdapterRows, DecoderModel, ForwardBatch, KVCache, Workspace
from tokenstep.sampling import SampleOutput, Sampler, SamplingParams, sample

SCORED_ROWS = 64  # prompt positions whose logits exist at the same time
BAD_LOGITS, NO_TOKEN_LEFT = 1, 2  # the sampler's statuses


@dataclass(slots=True)
class Sampled:
    """The numbers of one sampling step, an entry a row. `logprobs` is None where no row wanted any."""

    tokens: list[int]
    status: list[int]
    logprobs: _LogprobRows | None


class Runner:
    """Holds the KV cache, the sampler and the tensors of the decoding batch.

    Args:
        model: the decoder.
        vocab_size: the first ids of the model, which may be drawn; those behind them are padding.
        cache: the KV cache.
        max_batch: rows of the batch.
        max_tokens: tokens of the longest sequence.
    """

    def __init__(
        self,
        model: DecoderModel,
        vocab_size: int,
        cache: KVCache,
        *,
        max_batch: int,
        max_tokens: int,
    ) -> None:
        self.model = model
        self.device = model.device
        self.vocab_size = vocab_size
        self.cache = cache
        self._workspace = Workspace(model.config, model.dtype, model.device)
        self.sampler = self._new_sampler(max_batch)
        self._trial_sampler = Sampler(1, vocab_size)
        self._trial_lock = threading.Lock()
        self._block_size = cache.block_size
        # one row a slot, written when a choice gets the slot: a step only picks rows
        self._tables = torch.zeros(
            (max_batch, -(-max_tokens // cache.block_size)), dtype=torch.int32, device=model.device
        )
        self._decoding: list[Choice] = []  # whose next token `_batch` computes; [] if it must be made anew
        self._batch: ForwardBatch | None = None
        self._drawn: Tensor | None = None  # the tokens that these drew in the last step
        self._rows = torch.empty(0, dtype=torch.int32)
        self._rows_of: list[Choice] = []

    def check(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        """Raises ValueError or TypeError if `admit` would refuse the parameters or an id of the prompt.

        Safe from any thread.
        """
        with self._trial_lock:
            self._trial_sampler.admit(0, params, prompt)

    def admit(self, choice: Choice) -> None:
        """Sets up the row `choice.slot` for `choice`, which goes on after its output."""
        request = choice.state.request
        self.sampler.admit(choice.slot, request.choices[choice.index], request.prompt, choice.output)
        self._rows_of = []

    def release(self, slot: int) -> None:
        """Forgets the choice in `slot`."""
        self.sampler.release(slot)

    def reset(self) -> None:
        """Forgets all choices, and what a step that broke off may have left behind."""
        self.sampler = self._new_sampler(self.sampler.max_rows)
        self._trial_lock = threading.Lock()
        self._decoding, self._rows_of, self._drawn = [], [], None

    def set_table(self, slot: int, table: BlockTable, begin: int) -> None:
        """The blocks of the choice in `slot` are `table`, which has changed from index `begin` on."""
        self._tables[slot, begin : len(table)] = torch.tensor(table[begin:], dtype=torch.int32)
        self._decoding = []

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks of all layers: (source, copy)."""
        if not pairs:
            return
        sources, copies = torch.tensor(pairs, device=self.device).unbind(1)
        self.cache.copy_blocks(sources, copies)

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """Computes `pieces` in one pass; returns hidden states [sum of num_rows, hidden_size].

        Of each piece the last `num_rows` tokens'. They stay valid until the next call.
        """
        drawn, self._drawn = self._drawn, None
        if all(piece.count == 1 for piece in pieces):
            batch = self._decode_batch([piece.choice for piece in pieces], drawn)
        else:
            self._decoding = []
            batch = self._mixed_batch(pieces)
        return self.model.forward(batch, self.cache, self._workspace)

    def select(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """Those rows of `hidden`, in rising order."""
        if len(rows) == len(hidden):
            return hidden
        return hidden.index_select(0, self._tensor(rows, torch.int64))

    def _decode_batch(self, choices: list[Choice], drawn: Tensor | None) -> ForwardBatch:
        """One token of each choice; of the same as in the last step the one they have `drawn`."""
        batch = self._batch
        if batch is not None and drawn is not None and choices == self._decoding:
            batch.seq_lens += 1
            batch.tokens = drawn
            return batch
        slots = self._tensor([choice.slot for choice in choices], torch.int32)
        width = max(len(choice.table) for choice in choices)
        self._decoding = choices
        self._batch = ForwardBatch(
            tokens=self._tensor(
                [choice.tokens(at := choice.num_computed, at + 1)[0] for choice in choices], torch.int64
            ),
            block_table=self._tables[:, :width].index_select(0, slots),
            seq_lens=self._tensor([choice.num_computed + 1 for choice in choices], torch.int32),
            adapters=self._adapter_rows((choice, 1) for choice in choices),
        )
        return self._batch

    def _mixed_batch(self, pieces: Sequence[Piece]) -> ForwardBatch:
        tokens: list[int] = []
        rows: list[int] = []
        starts = [0]
        ends: list[int] = []
        for piece in pieces:
            begin = piece.choice.num_computed
            tokens += piece.choice.tokens(begin, begin + piece.count)
            rows += range(len(tokens) - piece.num_rows, len(tokens))
            starts.append(len(tokens))
            ends.append(begin + piece.count)
        slots = self._tensor([piece.choice.slot for piece in pieces], torch.int32)
        width = -(-max(ends) // self._block_size)
        return ForwardBatch(
            tokens=self._tensor(tokens, torch.int64),
            block_table=self._tables[:, :width].index_select(0, slots),
            seq_lens=self._tensor(ends, torch.int32),
            query_start=self._tensor(starts, torch.int32),
            max_query_len=max(piece.count for piece in pieces),
            logit_rows=None if len(rows) == len(tokens) else self._tensor(rows, torch.int64),
            adapters=self._adapter_rows((piece.choice, piece.count) for piece in pieces),
        )

    def _adapter_rows(self, counts: Iterable[tuple[Choice, int]]) -> AdapterRows | None:
        """Which adapter each choice's rows go through; so many rows has each."""
        return AdapterRows.of(
            ((choice.state.request.adapter, count) for choice, count in counts), self.device
        )

    def score(self, hidden: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs] | None:
        """Log probabilities of `tokens` after `hidden` [S, hidden_size], by the sampler's own arithmetic.

        None where logits are NaN or +inf.
        """
        scored: list[TokenLogprobs] = []
        ids = self._tensor(tokens, torch.int64)
        words = -(-self.vocab_size // 32)
        for begin in range(0, len(tokens), SCORED_ROWS):
            part = ids[begin : begin + SCORED_ROWS]
            # a mask that allows one token makes the sampler report on that one
            mask = torch.zeros((len(part), words), dtype=torch.int32, device=self.device)
            bits = torch.bitwise_left_shift(torch.ones_like(part), part % 32).to(torch.int32)
            mask.scatter_(1, (part // 32)[:, None], bits[:, None])
            logits = self._logits(hidden[begin : begin + SCORED_ROWS])
            out = sample(logits, temperature=0.0, token_bitmask=mask, logprobs=top, check=False)
            status, rows = out.status.tolist(), _LogprobRows(out)
            if BAD_LOGITS in status:
                return None
            for row, found in enumerate(status):
                impossible = TokenLogprobs(-math.inf, self.vocab_size, [], [])  # the logit is -inf
                scored.append(impossible if found == NO_TOKEN_LEFT else rows.entry(row, top))
        return scored

    def raw_logits(self, hidden: Tensor) -> npt.NDArray[np.float32]:
        """Logits after `hidden` [S, hidden_size], float32 [S, vocab_size]."""
        return self._logits(hidden).float().cpu().numpy()

    def sample(
        self, choices: Sequence[Choice], hidden: Tensor | None, shared: Sequence[tuple[Tensor, int]] = ()
    ) -> Sampled:
        """Draws a token for each choice.

        Args:
            choices: those of `hidden`, then those of `shared`.
            hidden: [R, hidden_size], a row for each of the first R choices; None: R = 0.
            shared: hidden states [1, hidden_size] with the number of choices that start from each.
        """
        parts = [] if hidden is None else [hidden]
        logits = self._logits(torch.cat([*parts, *(row for row, _ in shared)]) if shared else parts[0])
        if any(count > 1 for _, count in shared):
            own = len(logits) - len(shared)
            source = [
                *range(own),
                *(own + index for index, (_, count) in enumerate(shared) for _ in range(count)),
            ]
            logits = logits.index_select(0, self._tensor(source, torch.int64))
        choices = list(choices)
        if choices != self._rows_of:
            self._rows = self._tensor([choice.slot for choice in choices], torch.int32)
            self._rows_of = choices
        out = self.sampler.step(logits, rows=self._rows)
        self._drawn = out.tokens if choices == self._decoding else None
        rows = None if out.logprobs is None else _LogprobRows(out)
        return Sampled(out.tokens.tolist(), out.status.tolist(), rows)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)[:, : self.vocab_size]

    def _new_sampler(self, max_batch: int) -> Sampler:
        return Sampler(max_batch, self.vocab_size, str(self.device))

    def _tensor(self, values: Sequence[object], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


class _LogprobRows:
    """The log probabilities of one sampling step, as Python numbers."""

    def __init__(self, out: SampleOutput) -> None:
        self.logprobs: list[float] = out.logprobs.tolist()
        self.ranks: list[int] = out.ranks.tolist()
        self.top_tokens: list[list[int]] = out.top_tokens.tolist()
        self.top_logprobs: list[list[float]] = out.top_logprobs.tolist()

    def entry(self, row: int, top: int) -> TokenLogprobs:
        """Those of `row`, with the `top` most likely ids."""
        return TokenLogprobs(
            self.logprobs[row], self.ranks[row], self.top_tokens[row][:top], self.top_logprobs[row][:top]
        )
