"""The engine: requests in, tokens out, all sequences in one batch over one paged cache.

`step()` lets in whom it can, then computes prompts if any are due, else one token for everybody. It isn't
thread-safe but for `cancel`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch

from tokenstep.engine.block_manager import BlockManager
from tokenstep.engine.config import SPARE_BLOCKS, EngineConfig
from tokenstep.engine.request import (
    Choice,
    FailureKind,
    FailureOutput,
    FinishReason,
    Output,
    PromptOutput,
    Request,
    RequestState,
    TokenOutput,
)
from tokenstep.engine.runner import BAD_LOGITS, NO_TOKEN_LEFT, Runner, Sampled
from tokenstep.engine.scheduler import Demand, plan_admission
from tokenstep.engine.stats import Counters, EngineStats
from tokenstep.models import DecoderModel

FAILURES: dict[int, tuple[FailureKind, str]] = {
    BAD_LOGITS: ("bad_logits", "the model's logits contain NaN or +inf"),
    NO_TOKEN_LEFT: ("no_token_left", "no token is left to draw: every one is banned or has probability 0"),
}


class Engine:
    """Generates tokens for many requests at a time.

    Args:
        model: the decoder.
        vocab_size: ids the tokenizer has; no other is ever drawn.
        config: sizes.

    Attributes:
        vocab_size: ids that both the tokenizer and the model have.
        max_length: tokens of the longest sequence: the model's context, or all that the KV cache holds.
        model_length: the model's context.
    """

    def __init__(self, model: DecoderModel, vocab_size: int, config: EngineConfig) -> None:
        self.config = config
        self.vocab_size = min(vocab_size, model.config.vocab_size)
        num_blocks = config.num_blocks(model.config, model.dtype, model.device)
        self.model_length = model.config.max_position
        self.max_length = min(self.model_length, num_blocks * config.block_size)
        num_blocks += SPARE_BLOCKS
        self.blocks = BlockManager(num_blocks, config.block_size)
        self.runner = Runner(
            model,
            self.vocab_size,
            max_batch=config.max_batch,
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_tokens=self.max_length,
        )
        self._free_slots = list(range(config.max_batch - 1, -1, -1))
        self._waiting: deque[RequestState] = deque()  # those with choices that have no row yet
        self._prefilling: list[RequestState] = []
        self._running: list[Choice] = []
        self._batch_is_current = False
        self._states: dict[Request, RequestState] = {}
        self._cancelled: deque[tuple[Request, int | None]] = deque()
        self.counters = Counters()

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return bool(self._states)

    def __contains__(self, request: Request) -> bool:
        """Whether `request` has been added and isn't done."""
        return request in self._states

    def is_waiting(self, request: Request) -> bool:
        """Whether nothing has been computed for `request` yet."""
        state = self._states.get(request)
        return state is not None and not state.prompt_table

    def check(self, request: Request) -> None:
        """Raises ValueError or TypeError if `request` could never run. Safe from any thread."""
        if not request.prompt:
            raise ValueError("tokenstep.engine: the prompt is empty")
        length = len(request.prompt) + request.max_tokens
        if length > self.max_length:
            raise ValueError(
                f"tokenstep.engine: {length} tokens of prompt and output, the engine holds {self.max_length}"
            )
        for params in request.choices:
            self.runner.check(params, request.prompt)

    def add(self, request: Request) -> None:
        """Queues a request that has passed `check`."""
        state = self._states[request] = RequestState(request)
        self._waiting.append(state)

    def cancel(self, request: Request, choice: int | None = None) -> None:
        """Ends a choice that has begun, or all of `request`, before the next step. Safe from any thread."""
        self._cancelled.append((request, choice))

    def step(self) -> list[Output]:
        """Computes the next piece of work; returns what came of it, in order."""
        self.drop_cancelled()
        self.counters.steps += 1
        self._admit()
        outputs = self._prefill()
        if ready := [
            state for state in self._states.values() if state.granted and state.last_hidden is not None
        ]:
            return outputs + self._start(ready)
        if not outputs and not self._prefilling and self._running:
            return self._decode()
        return outputs

    def drop_cancelled(self) -> None:
        """Frees what the cancelled ones hold."""
        while self._cancelled:
            request, index = self._cancelled.popleft()
            state = self._states.get(request)
            if state is None:
                continue
            if index is None:
                self._drop(state)
                continue
            for choice in [choice for choice in state.live if choice.index == index and choice.num_generated]:
                self._finish(choice)

    def recover(self, error: BaseException) -> list[Output]:
        """After a step that raised `error`: drops all requests, and says so."""
        message = f"the engine's step has failed: {error or type(error).__name__}"
        self.counters.failures["broken_step"] = self.counters.failures.get("broken_step", 0) + len(
            self._states
        )
        outputs: list[Output] = [FailureOutput(request, "broken_step", message) for request in self._states]
        self.reset()
        return outputs

    def stats(self, waiting: int, waiting_tokens: int) -> EngineStats:
        """A snapshot; the numbers of what waits are the caller's."""
        blocks = self.blocks
        return EngineStats(
            waiting=waiting,
            waiting_tokens=waiting_tokens,
            running=len(self._running),
            blocks_used=blocks.num_blocks - blocks.num_free,
            blocks_cached=0,
            blocks_total=blocks.num_blocks,
            counters=replace(self.counters, failures=dict(self.counters.failures)),
        )

    def reset(self) -> None:
        """Forgets all requests; for after a step that broke off midway."""
        for state in self._states.values():
            for choice in state.live:
                self.runner.release(choice.slot)
        self.blocks = BlockManager(self.blocks.num_blocks, self.blocks.block_size)
        self._free_slots = list(range(self.config.max_batch - 1, -1, -1))
        for holder in (self._waiting, self._prefilling, self._running, self._states, self._cancelled):
            holder.clear()
        self._batch_is_current = False

    def _admit(self) -> None:
        demands = (self._demand(state) for state in self._waiting)
        for count in plan_admission(demands, len(self._free_slots), self.blocks.num_free):
            state = self._waiting[0]
            prompt = state.request.prompt
            if not state.prompt_table:
                self.blocks.grow(state.table, len(prompt))
                state.prompt_table = list(state.table)
                self._prefilling.append(state)
            for _ in range(count):
                self._grant(state)
            if not state.num_pending:
                self._waiting.popleft()

    def _demand(self, state: RequestState) -> Demand:
        request, blocks = state.request, self.blocks
        prompt_blocks = blocks.blocks_for(len(request.prompt))
        writes = request.max_tokens > 1  # the last token is never stored
        full_blocks = len(request.prompt) // blocks.block_size
        last = len(request.prompt) + request.max_tokens - 1
        return Demand(
            prompt_blocks=prompt_blocks - len(state.table),
            choice_blocks=blocks.blocks_for(last) - full_blocks if writes else 0,
            choices=state.num_pending,
            spare_blocks=prompt_blocks - full_blocks if writes else 0,
        )

    def _grant(self, state: RequestState) -> None:
        """A row and all its blocks for the next choice; the last one inherits the request's hold."""
        request = state.request
        is_last = state.num_pending == 1
        table = list(state.table) if is_last else self.blocks.fork(state.table)
        if is_last:
            state.table = []
        if request.max_tokens > 1:
            if len(request.prompt) % self.blocks.block_size:
                copy = self.blocks.make_writable(table, len(request.prompt))
                state.copies += [copy] if copy else []
            self.blocks.grow(table, len(request.prompt) + request.max_tokens - 1)
        choice = Choice(state, state.next_choice, self._free_slots.pop(), table)
        self.runner.admit(choice.slot, table, request.choices[choice.index], request.prompt)
        state.next_choice += 1
        state.granted.append(choice)
        state.live.append(choice)

    def _prefill(self) -> list[Output]:
        """The next `prefill_tokens` tokens of the prompts that are due."""
        budget = self.config.prefill_tokens
        pieces: list[tuple[RequestState, Sequence[int]]] = []
        for state in self._prefilling:
            piece = state.request.prompt[state.num_computed :][:budget]
            pieces.append((state, piece))
            budget -= len(piece)
            if not budget:
                break
        if not pieces:
            return []
        hidden_rows = self.runner.prefill(
            [(piece, state.prompt_table, state.num_computed) for state, piece in pieces],
            [state.request.prompt_logprobs is not None for state, _ in pieces],
        )
        outputs: list[Output] = []
        for (state, piece), hidden in zip(pieces, hidden_rows, strict=True):
            outputs += self._take_prompt_piece(state, piece, hidden)
        return outputs

    def _take_prompt_piece(
        self, state: RequestState, piece: Sequence[int], hidden: torch.Tensor
    ) -> list[Output]:
        request = state.request
        if request.prompt_logprobs is not None:
            following = request.prompt[state.num_computed + 1 :][: len(piece)]
            scored = self.runner.score(hidden[: len(following)], following, request.prompt_logprobs)
            if scored is None:
                return [self._fail(state, BAD_LOGITS)]
            state.prompt_logprobs += scored
        state.num_computed += len(piece)
        self.counters.computed_tokens += len(piece)
        if state.num_computed < len(request.prompt):
            return []
        self._prefilling.remove(state)
        self.counters.prompt_tokens += len(request.prompt)
        state.last_hidden = hidden[-1:]
        if not request.max_tokens:
            self._drop(state)
        return [PromptOutput(request, state.prompt_logprobs)]

    def _start(self, ready: Sequence[RequestState]) -> list[Output]:
        """The first token of every granted choice."""
        self.runner.copy_blocks([pair for state in ready for pair in state.copies])
        choices = [choice for state in ready for choice in state.granted]
        hidden = torch.cat([state.last_hidden for state in ready if state.last_hidden is not None])
        sampled = self.runner.first_tokens(hidden, choices, [len(state.granted) for state in ready])
        for state in ready:
            state.copies.clear()
            state.granted.clear()
        self._running += choices
        self._batch_is_current = False
        return self._take_tokens(choices, sampled)

    def _decode(self) -> list[Output]:
        """One more token for every running choice."""
        if not self._batch_is_current:
            self.runner.set_batch(self._running)
            self._batch_is_current = True
        return self._take_tokens(list(self._running), self.runner.decode())

    def _take_tokens(self, choices: Sequence[Choice], sampled: Sampled) -> list[Output]:
        outputs: list[Output] = []
        for row, (choice, token, status) in enumerate(
            zip(choices, sampled.tokens, sampled.status, strict=True)
        ):
            state, request = choice.state, choice.state.request
            if status:
                if request in self._states:
                    outputs.append(self._fail(state, status))
                continue
            if request not in self._states:  # another choice of it has failed in this step
                continue
            self.counters.generated_tokens += 1
            choice.num_generated += 1
            choice.last_token = token
            finish = self._finish_reason(choice)
            logprobs = None
            if sampled.logprobs is not None and request.logprobs is not None:
                logprobs = sampled.logprobs.entry(row, request.logprobs)
            outputs.append(TokenOutput(request, choice.index, token, logprobs, finish))
            if finish:
                self._finish(choice)
        return outputs

    def _finish_reason(self, choice: Choice) -> FinishReason | None:
        request = choice.state.request
        if choice.last_token in request.end_ids and choice.num_generated >= request.min_tokens:
            return "stop"
        return "length" if choice.num_generated >= request.max_tokens else None

    def _fail(self, state: RequestState, status: int) -> FailureOutput:
        """Drops a request that can't go on; the others aren't touched."""
        self._drop(state)
        kind, message = FAILURES[status]
        self.counters.failures[kind] = self.counters.failures.get(kind, 0) + 1
        return FailureOutput(state.request, kind, message)

    def _finish(self, choice: Choice) -> None:
        """Takes `choice` out and frees what it holds; the request with it, if it was the last."""
        state = choice.state
        self.blocks.free(choice.table)
        self.runner.release(choice.slot)
        self._free_slots.append(choice.slot)
        state.live.remove(choice)
        if choice in self._running:
            self._running.remove(choice)
            self._batch_is_current = False
        if not state.live and not state.num_pending:
            self._drop(state)

    def _drop(self, state: RequestState) -> None:
        """Forgets a request and frees all that it holds."""
        if self._states.pop(state.request, None) is None:
            return
        if state in self._waiting:
            self._waiting.remove(state)
        if state in self._prefilling:
            self._prefilling.remove(state)
        self.blocks.free(state.table)
        for choice in list(state.live):
            self._finish(choice)
