"""Runs model and sampler for the engine: from token ids and block tables to tensors, and back to numbers."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenstep.engine.block_manager import BlockTable
from tokenstep.engine.request import Choice, TokenLogprobs
from tokenstep.models import DecoderModel, ForwardBatch, KVCache
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
        max_batch: rows of the batch.
        num_blocks: blocks of the KV cache.
        block_size: tokens in a block.
        max_tokens: tokens of the longest sequence.
    """

    def __init__(
        self,
        model: DecoderModel,
        vocab_size: int,
        *,
        max_batch: int,
        num_blocks: int,
        block_size: int,
        max_tokens: int,
    ) -> None:
        self.model = model
        self.device = model.device
        self.vocab_size = vocab_size
        self.cache = KVCache.allocate(model.config, num_blocks, block_size, model.dtype, model.device)
        self.sampler = Sampler(max_batch, vocab_size, str(model.device))
        self._trial_sampler = Sampler(1, vocab_size)
        self._trial_lock = threading.Lock()
        self._block_size = block_size
        # one row a slot, written when a choice gets the slot: a step only picks rows
        self._tables = torch.zeros(
            (max_batch, -(-max_tokens // block_size)), dtype=torch.int32, device=model.device
        )
        self._batch: ForwardBatch | None = None
        self._rows: Tensor | None = None

    def check(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        """Raises ValueError or TypeError if `admit` would refuse the parameters or an id of the prompt.

        Safe from any thread.
        """
        with self._trial_lock:
            self._trial_sampler.admit(0, params, prompt)

    def admit(self, slot: int, table: BlockTable, params: SamplingParams, prompt: Sequence[int]) -> None:
        """Sets up `slot` for a choice that will write to the blocks of `table`."""
        self._tables[slot, : len(table)] = torch.tensor(table, dtype=torch.int32)
        self.sampler.admit(slot, params, prompt)

    def release(self, slot: int) -> None:
        """Forgets the choice in `slot`."""
        self.sampler.release(slot)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks of all layers: (source, copy)."""
        if not pairs:
            return
        sources, copies = torch.tensor(pairs, device=self.device).unbind(1)
        for layers in (self.cache.k, self.cache.v):
            for layer in layers:
                layer[copies] = layer[sources]

    def prefill(
        self, pieces: Sequence[tuple[Sequence[int], BlockTable, int]], all_rows: Sequence[bool]
    ) -> list[Tensor]:
        """Computes pieces of prompts in one pass: (tokens, the prompt's blocks, tokens computed before).

        Returns for each its hidden states: [tokens, hidden_size] where `all_rows`, else the last token's
        [1, hidden_size].
        """
        tokens = [token for piece, _, _ in pieces for token in piece]
        ends = [computed + len(piece) for piece, _, computed in pieces]
        width = max(-(-end // self._block_size) for end in ends)
        starts = [0]
        rows: list[int] = []
        counts: list[int] = []
        for (piece, _, _), every in zip(pieces, all_rows, strict=True):
            start, end = starts[-1], starts[-1] + len(piece)
            wanted = range(start if every else end - 1, end)
            starts.append(end)
            rows.extend(wanted)
            counts.append(len(wanted))
        hidden = self.model.forward(
            ForwardBatch(
                tokens=self._tensor(tokens, torch.int64),
                block_table=self._tensor(
                    [[*table[:width], *[0] * (width - len(table))] for _, table, _ in pieces], torch.int32
                ),
                seq_lens=self._tensor(ends, torch.int32),
                query_start=self._tensor(starts, torch.int32),
                max_query_len=max(len(piece) for piece, _, _ in pieces),
                logit_rows=None if len(rows) == len(tokens) else self._tensor(rows, torch.int64),
            ),
            self.cache,
        )
        return list(torch.split(hidden, counts))

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

    def first_tokens(self, hidden: Tensor, choices: Sequence[Choice], repeats: Sequence[int]) -> Sampled:
        """Samples for `choices` from the last `hidden` [prompts, hidden_size] of their prompts.

        The first repeats[0] choices belong to prompt 0, and so on.
        """
        source = [index for index, count in enumerate(repeats) for _ in range(count)]
        logits = self._logits(hidden)
        if len(source) > len(repeats):
            logits = logits.index_select(0, self._tensor(source, torch.int64))
        rows = self._tensor([choice.slot for choice in choices], torch.int32)
        return self._read(self.sampler.step(logits, rows=rows))

    def set_batch(self, choices: Sequence[Choice]) -> None:
        """Takes `choices` as the decoding batch; needed whenever one has joined or left."""
        slots = self._tensor([choice.slot for choice in choices], torch.int32)
        width = max(len(choice.table) for choice in choices)
        self._rows = slots
        self._batch = ForwardBatch(
            tokens=self._tensor([choice.last_token for choice in choices], torch.int64),
            block_table=self._tables[:, :width].index_select(0, slots),
            seq_lens=self._tensor([choice.num_tokens - 1 for choice in choices], torch.int32),
        )

    def decode(self) -> Sampled:
        """One token more for each choice of the batch."""
        batch = self._batch
        assert batch is not None, "set_batch comes first"
        batch.seq_lens += 1
        out = self.sampler.step(self._logits(self.model.forward(batch, self.cache)), rows=self._rows)
        batch.tokens = out.tokens
        return self._read(out)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)[:, : self.vocab_size]

    def _read(self, out: SampleOutput) -> Sampled:
        rows = None if out.logprobs is None else _LogprobRows(out)
        return Sampled(out.tokens.tolist(), out.status.tolist(), rows)

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
