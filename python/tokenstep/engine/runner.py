"""Runs model and sampler for the engine: from token ids and block tables to tensors, and back to numbers."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenstep.engine.block_manager import BlockTable
from tokenstep.engine.cuda_graph import GraphCapture
from tokenstep.engine.decode_step import Capture, DecodeStep, Places, padded_size
from tokenstep.engine.request import TokenLogprobs
from tokenstep.engine.results import LogprobRows, Results, Unread
from tokenstep.engine.sequence import Choice, Piece
from tokenstep.engine.slots import SlotState, upload
from tokenstep.models import AdapterRows, DecoderModel, ForwardBatch, KVCache, Span, Workspace
from tokenstep.sampling import Sampler, SamplingParams, sample

SCORED_ROWS = 64  # prompt positions whose logits exist at the same time
BAD_LOGITS, NO_TOKEN_LEFT = 1, 2  # the sampler's statuses
IDLE = SamplingParams(temperature=0.0)


class Runner:
    """Holds the KV cache, the sampler and the tensors of the decoding batch.

    Args:
        model: the decoder.
        vocab_size: the first ids of the model, which may be drawn; those behind them are padding.
        max_batch: rows of the batch.
        num_blocks: blocks of the KV cache.
        block_size: tokens in a block.
        max_tokens: tokens of the longest sequence.
        pads: decoding batches have one of few sizes, with idle places.
        captures: a decode step is captured in a CUDA graph.
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
        pads: bool = False,
        captures: bool = False,
    ) -> None:
        self.model = model
        self.device = model.device
        self.vocab_size = vocab_size
        self.cache = KVCache.allocate(model.config, num_blocks, block_size, model.dtype, model.device)
        self._workspace = Workspace(model.config, model.dtype, model.device)
        self._max_batch = max_batch
        self._block_size = block_size
        self._pads = pads
        self._capture: Capture | None = GraphCapture(self.device) if captures else None
        self.state = SlotState(max_batch, -(-max_tokens // block_size), self.device)
        self._places = Places(self.state)
        self.sampler = self._new_sampler()
        self._results = Results(max_batch, self.device)
        self._trial_sampler = Sampler(1, vocab_size)
        self._trial_lock = threading.Lock()
        self._steps: dict[int, DecodeStep] = {}  # by their places
        self._placed: tuple[DecodeStep | None, list[Choice]] = None, []  # the last step, who has its places

    def check(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        """Raises ValueError or TypeError if `admit` would refuse the parameters or an id of the prompt.

        Safe from any thread.
        """
        with self._trial_lock:
            self._trial_sampler.admit(0, params, prompt)

    def admit(self, choice: Choice) -> None:
        """Sets up the row `choice.slot` for `choice`, which goes on after its output."""
        self.sampler.admit(choice.slot, choice.params, choice.state.request.prompt, choice.output)
        self.state.set_length(choice.slot, choice.num_computed)
        self._placed = None, []

    def release(self, slot: int) -> None:
        """Forgets the choice in `slot`."""
        self.sampler.release(slot)

    def reset(self) -> None:
        """Forgets all choices, and what a step that broke off may have left behind."""
        self.sampler = self._new_sampler()
        self._trial_lock = threading.Lock()
        self._steps.clear()
        self._placed = None, []

    def set_table(self, slot: int, table: BlockTable, begin: int) -> None:
        """The blocks of the choice in `slot` are `table`, which has changed from index `begin` on."""
        if begin < len(table):
            self.state.set_table(slot, table[begin:], begin)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks of all layers: (source, copy)."""
        if not pairs:
            return
        sources, copies = self._tensor(pairs, torch.int64).unbind(1)
        for layers in (self.cache.k, self.cache.v):
            for layer in layers:
                layer[copies] = layer[sources]

    def decode(self, choices: Sequence[Choice]) -> Unread:
        """Computes the last token of each choice, which its slot holds, and draws its next."""
        choices = list(choices)
        step = self._step_for(len(choices))
        if self._placed != (step, choices):
            adapters = self._adapter_rows((choice, 1) for choice in choices)
            step.place([choice.slot for choice in choices], adapters)
            self._placed = step, choices
        step.run()
        return self._results.fetch(step.size, len(choices), _most_logprobs(choices))

    @torch.inference_mode()
    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """Computes `pieces` in one pass; returns hidden states [sum of num_rows, hidden_size].

        Of each piece the last `num_rows` tokens'. They stay valid until the next call.
        """
        batch = self._mixed_batch(pieces)
        return self.model.forward(batch, self.cache, self._workspace)

    def select(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """Those rows of `hidden`, in rising order."""
        if len(rows) == len(hidden):
            return hidden
        return hidden.index_select(0, self._tensor(rows, torch.int64))

    def _step_for(self, count: int) -> DecodeStep:
        """The step for `count` choices; made when it is first asked for."""
        size = padded_size(count, self._max_batch) if self._pads else count
        step = self._steps.get(size)
        if step is None:
            step = self._steps[size] = DecodeStep(
                size,
                self.model,
                self.vocab_size,
                self.cache,
                self.state,
                self._places,
                self.sampler,
                self._results,
                self._workspace,
                self._capture,
            )
        return step

    def _mixed_batch(self, pieces: Sequence[Piece]) -> ForwardBatch:
        """The tokens of `pieces`: those of a prompt from the host, the last of who decodes from its slot."""
        tokens: list[int] = []
        rows: list[int] = []
        starts = [0]
        ends: list[int] = []
        drawn: list[tuple[int, int]] = []  # row, slot
        fresh: list[Span] = []
        for index, piece in enumerate(pieces):
            choice, begin = piece.choice, piece.choice.num_computed
            if not begin:
                fresh.append(Span(index, len(tokens), len(tokens) + piece.count))
            if choice.is_decoding:
                drawn.append((len(tokens), choice.slot))
                tokens.append(0)
            else:
                tokens += choice.tokens(begin, begin + piece.count)
            rows += range(len(tokens) - piece.num_rows, len(tokens))
            starts.append(len(tokens))
            ends.append(begin + piece.count)
        state, ids = self.state, self._tensor(tokens, torch.int64)
        if drawn:
            places, sources = self._tensor(drawn, torch.int64).unbind(1)
            ids.index_copy_(0, places, state.tokens.index_select(0, sources))
        slots = self._tensor([piece.choice.slot for piece in pieces], torch.int64)
        seq_lens = self._tensor(ends, torch.int32)
        state.lengths.index_copy_(0, slots, seq_lens)
        one_each = len(tokens) == len(pieces)
        return ForwardBatch(
            tokens=ids,
            block_table=state.tables.index_select(0, slots),
            seq_lens=seq_lens,
            query_start=None if one_each else self._tensor(starts, torch.int32),
            max_query_len=max(piece.count for piece in pieces),
            logit_rows=None if len(rows) == len(tokens) else self._tensor(rows, torch.int64),
            adapters=self._adapter_rows((piece.choice, piece.count) for piece in pieces),
            fresh=fresh,
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
            status, rows = out.status.tolist(), LogprobRows(out, len(part), top)
            if BAD_LOGITS in status:
                return None
            for row, found in enumerate(status):
                impossible = TokenLogprobs(-math.inf, self.vocab_size, [], [])  # the logit is -inf
                scored.append(impossible if found == NO_TOKEN_LEFT else rows.entry(row, top))
        return scored

    def raw_logits(self, hidden: Tensor) -> npt.NDArray[np.float32]:
        """Logits after `hidden` [S, hidden_size], float32 [S, vocab_size]."""
        return self._logits(hidden).float().cpu().numpy()

    @torch.inference_mode()
    def sample(
        self, choices: Sequence[Choice], hidden: Tensor | None, shared: Sequence[tuple[Tensor, int]] = ()
    ) -> Unread:
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
        rows = self._tensor([choice.slot for choice in choices], torch.int32)
        out = self._results.out(len(choices))
        self.sampler.step(logits, rows=rows, out=out)
        self.state.take_drawn(rows.long(), out.tokens)
        return self._results.fetch(len(choices), len(choices), _most_logprobs(choices))

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)[:, : self.vocab_size]

    def _new_sampler(self) -> Sampler:
        sampler = Sampler(2 * self._max_batch, self.vocab_size, str(self.device))
        for slot in self.state.idle(self._max_batch):
            sampler.admit(slot, IDLE)
        return sampler

    def _tensor(self, values: Sequence[object], dtype: torch.dtype) -> Tensor:
        return upload(values, dtype, self.device)


def _most_logprobs(choices: Sequence[Choice]) -> int | None:
    """The most top log probabilities that one of them wants; None if nobody wants any."""
    wanted = (choice.params.logprobs for choice in choices)
    return max((top for top in wanted if top is not None), default=None)
