"""The engine: requests in, tokens out, all sequences in one batch over one paged cache.

Sequences join and leave at every step. A step computes the next token of each that decodes and pieces of
prompts beside them. It isn't thread-safe but for `check` and `cancel`; `EngineLoop` runs it for many threads.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from tokenstep.engine.block_manager import BlockManager
from tokenstep.engine.config import EngineConfig
from tokenstep.engine.request import (
    FailureKind,
    FailureOutput,
    FinishReason,
    Output,
    PromptOutput,
    Request,
    TokenOutput,
)
from tokenstep.engine.results import Unread
from tokenstep.engine.runner import BAD_LOGITS, NO_TOKEN_LEFT, Runner
from tokenstep.engine.scheduler import Scheduler
from tokenstep.engine.sequence import Choice, Piece, RequestState
from tokenstep.engine.stats import Counters, EngineStats
from tokenstep.models import DecoderModel

FAILURES: dict[int, tuple[FailureKind, str]] = {
    BAD_LOGITS: ("bad_logits", "the model's logits contain NaN or +inf"),
    NO_TOKEN_LEFT: ("no_token_left", "no token is left to draw: every one is banned or has probability 0"),
}


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that has been launched, and whose tokens nobody has read: who drew them, where they arrive."""

    choices: Sequence[Choice]
    drawn: Unread


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
        reads_late: the tokens of a step are read when the next one has been launched.
        counters: what it has done.
        scheduler: who is in the batch.
    """

    def __init__(self, model: DecoderModel, vocab_size: int, config: EngineConfig) -> None:
        self.config = config
        if config.batch_invariant:
            model = model.as_batch_invariant()
        self.vocab_size = min(vocab_size, model.config.vocab_size)
        num_blocks = config.num_blocks(model.config, model.dtype, model.device)
        self.model_length = model.config.max_position
        self.max_length = min(self.model_length, num_blocks * config.block_size)
        self.counters = Counters()
        on_gpu = model.device.type == "cuda"
        self.reads_late = on_gpu if config.reads_late is None else config.reads_late
        self.runner = Runner(
            model,
            self.vocab_size,
            max_batch=config.max_batch,
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_tokens=self.max_length,
            pads=on_gpu or self.reads_late,
            captures=on_gpu and config.cuda_graphs,
        )
        self.scheduler = Scheduler(config, num_blocks, self.runner, self.counters)
        self._num_added = 0
        self._states: dict[Request, RequestState] = {}
        self._outputs: list[Output] = []
        self._in_flight: _Flight | None = None
        self._cancelled: deque[tuple[Request, int | None]] = deque()
        self._suspects: deque[RequestState] = deque()  # each computes a step alone, after one has failed

    @property
    def blocks(self) -> BlockManager:
        """Who holds which block of the KV cache."""
        return self.scheduler.blocks

    @property
    def has_work(self) -> bool:
        """Whether there are requests."""
        return bool(self._states)

    def __contains__(self, request: Request) -> bool:
        """Whether `request` has been added and isn't done."""
        return request in self._states

    def is_waiting(self, request: Request) -> bool:
        """Whether nothing has been computed for `request` yet."""
        state = self._states.get(request)
        return state is not None and state.cached_tokens is None

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
        if any(params.seed is None for params in request.choices):
            # chosen once, so that a choice that is computed again draws the same tokens
            request.choices = [
                replace(params, seed=secrets.randbits(64)) if params.seed is None else params
                for params in request.choices
            ]
        state = self._states[request] = RequestState(request, self._num_added)
        self._num_added += 1
        state.choices[0] = first = Choice(state, 0)
        self.scheduler.add(first)

    def cancel(self, request: Request, choice: int | None = None) -> None:
        """Ends a choice that has begun, or all of `request`, before the next step. Safe from any thread."""
        self._cancelled.append((request, choice))

    def step(self) -> list[Output]:
        """Launches the next piece of work; returns what came of it, or of the one before, in order.

        With `reads_late` the tokens of a step are read when the next one has been launched, so that the
        device doesn't wait for the host.
        """
        self.drop_cancelled()
        suspect = self._suspects[0] if self._suspects else None
        pieces, starting = self.scheduler.schedule(self._settle, suspect)
        before, self._in_flight = self._in_flight, self._launch(pieces, starting, suspect)
        self._read(before)
        if suspect or not self.reads_late:
            self._settle()
        self._clear(suspect)
        return self._take_outputs()

    def drop_cancelled(self) -> None:
        """Frees what the cancelled ones hold."""
        while self._cancelled:
            request, index = self._cancelled.popleft()
            state = self._states.get(request)
            if state is None:
                continue
            if index is None:
                self._drop(state)
            elif (choice := state.choices.get(index)) and choice.num_drawn:
                self._finish(choice)

    def recover(self, error: BaseException) -> list[Output]:
        """Goes on after a step that raised `error`: all that ran is computed again from the start.

        So that one bad request doesn't take the others with it, each that ran computes its next step alone.
        The one that fails then is dropped. Returns what is to be reported.
        """
        scheduler = self.scheduler
        involved = dict.fromkeys(choice.state for choice in [*scheduler.running, *scheduler.waiting[:1]])
        self._in_flight = None
        scheduler.restart()
        self.runner.reset()
        if self._suspects:
            message = f"the engine's step has failed: {error or type(error).__name__}"
            self._fail(self._suspects[0], "broken_step", message)
        else:
            self._suspects.extend(involved)
        return self._take_outputs()

    def reset(self) -> None:
        """Forgets all requests."""
        for holder in (self._states, self._outputs, self._cancelled, self._suspects):
            holder.clear()
        self._in_flight = None
        self.scheduler.clear()
        self.runner.reset()

    def stats(self) -> EngineStats:
        """A snapshot."""
        blocks = self.blocks
        return EngineStats(
            running=len(self.scheduler.running),
            blocks_used=blocks.num_blocks - blocks.num_free,
            blocks_cached=blocks.num_reusable,
            blocks_total=blocks.num_blocks,
            counters=replace(self.counters, failures=dict(self.counters.failures)),
        )

    def _clear(self, suspect: RequestState | None) -> None:
        """The step has succeeded, so `suspect`, which computed it alone, isn't to blame."""
        if self._suspects and self._suspects[0] is suspect:
            self._suspects.popleft()

    def _launch(
        self, pieces: Sequence[Piece], starting: list[Choice], suspect: RequestState | None
    ) -> _Flight | None:
        """Computes `pieces` and draws for all that are ready then, and for those that start from a hold."""
        self.counters.steps += bool(pieces or starting)
        if pieces and not starting and all(piece.choice.is_decoding for piece in pieces):
            choices = [piece.choice for piece in pieces]
            drawn = self.runner.decode(choices)
            for choice in choices:
                self._count_computed(choice, 1)
        else:
            ready, hidden = self._advance(pieces)
            starting += self.scheduler.start_from_holds(suspect)
            choices = [*ready, *starting]
            if not choices:
                return None
            drawn = self._draw(ready, hidden, starting)
        for choice in choices:
            choice.num_unread += 1
            choice.is_decoding = True
        for state in dict.fromkeys(choice.state for choice in starting):
            if not any(choice.starts_from_hold for choice in state.choices.values()):
                self.scheduler.release_hold(state)
        return _Flight(choices, drawn)

    def _advance(self, pieces: Sequence[Piece]) -> tuple[list[Choice], Tensor | None]:
        """Computes `pieces`; returns those that can draw now, with their hidden states, a row each."""
        if not pieces:
            return [], None
        hidden = self.runner.forward(pieces)
        ready: list[Choice] = []
        rows: list[int] = []
        end = 0
        for piece in pieces:
            choice, state = piece.choice, piece.choice.state
            begin, end = end, end + piece.num_rows
            self._count_computed(choice, piece.count)
            if not state.prompt_is_done:
                self._take_prompt_piece(piece, hidden[begin:end])
            if not choice.has_ended and not choice.num_uncomputed:
                ready.append(choice)
                rows.append(end - 1)
        return ready, self.runner.select(hidden, rows)

    def _count_computed(self, choice: Choice, count: int) -> None:
        choice.num_computed += count
        self.counters.computed_tokens += count
        self.scheduler.remember(choice)

    def _take_prompt_piece(self, piece: Piece, hidden: Tensor) -> None:
        """Scores tokens of a prompt, if asked for; at its end reports it and brings in the other choices."""
        choice, state, request = piece.choice, piece.choice.state, piece.choice.state.request
        if request.prompt_logprobs is not None:
            known = len(state.prompt_logprobs)  # more than the piece's start, if it is computed again
            following = request.prompt[known + 1 : choice.num_computed + 1]
            first = known - (choice.num_computed - piece.count)
            scored = self.runner.score(
                hidden[first : first + len(following)], following, request.prompt_logprobs
            )
            if scored is None:
                self._fail(state, *FAILURES[BAD_LOGITS])
                return
            state.prompt_logprobs += scored
        if choice.num_uncomputed:
            return
        cached = state.cached_tokens or 0
        self.counters.prompt_tokens += len(request.prompt)
        self.counters.cached_tokens += cached
        logits = self.runner.raw_logits(hidden[-1:])[0] if request.prompt_logits else None
        self._outputs.append(PromptOutput(request, state.prompt_logprobs, cached, logits))
        state.prompt_is_done = True
        if not request.max_tokens:
            self._drop(state)
        elif len(request.choices) > 1:
            self.scheduler.hold(choice, hidden[-1:].clone())
            for index in range(1, len(request.choices)):
                state.choices[index] = other = Choice(state, index, keys=list(choice.keys))
                self.scheduler.add(other)

    def _draw(self, ready: Sequence[Choice], hidden: Tensor | None, starting: Sequence[Choice]) -> Unread:
        """The next token of those that are ready, the first of those that start from a hold."""
        holds: dict[RequestState, int] = {}  # how many start from each
        for choice in starting:
            holds[choice.state] = holds.get(choice.state, 0) + 1
        shared = [
            (state.last_hidden, count) for state, count in holds.items() if state.last_hidden is not None
        ]
        return self.runner.sample([*ready, *starting], hidden if ready else None, shared)

    def _settle(self) -> bool:
        """Reads what is in flight; returns whether there was anything."""
        flight, self._in_flight = self._in_flight, None
        self._read(flight)
        return flight is not None

    def _read(self, flight: _Flight | None) -> None:
        """Takes the tokens that a launched step has drawn; those of choices that have ended are dropped."""
        if flight is None or all(choice.has_ended for choice in flight.choices):
            return
        sampled = flight.drawn.read()
        for row, (choice, token, status) in enumerate(
            zip(flight.choices, sampled.tokens, sampled.status, strict=True)
        ):
            if choice.has_ended:
                continue
            request = choice.state.request
            if status:
                self._fail(choice.state, *FAILURES[status])
                continue
            self.counters.generated_tokens += 1
            choice.output.append(token)
            choice.num_unread -= 1
            finish = self._finish_reason(choice)
            logprobs = None
            if sampled.logprobs is not None and request.logprobs is not None:
                logprobs = sampled.logprobs.entry(row, request.logprobs)
            self._outputs.append(TokenOutput(request, choice.index, token, logprobs, finish))
            if finish:
                self._finish(choice)
            else:
                self.scheduler.remember(choice)

    def _finish_reason(self, choice: Choice) -> FinishReason | None:
        request = choice.state.request
        if choice.output[-1] in request.end_ids and len(choice.output) >= request.min_tokens:
            return "stop"
        return "length" if len(choice.output) >= request.max_tokens else None

    def _fail(self, state: RequestState, kind: FailureKind, message: str) -> None:
        """Drops a request that can't go on; the others aren't touched."""
        if state.request in self._states:
            self._drop(state)
            self.counters.failures[kind] = self.counters.failures.get(kind, 0) + 1
            self._outputs.append(FailureOutput(state.request, kind, message))

    def _finish(self, choice: Choice) -> None:
        """Frees what `choice` holds; its request goes with its last choice."""
        self.scheduler.remove(choice)
        del choice.state.choices[choice.index]
        if not choice.state.choices:
            self._drop(choice.state)

    def _drop(self, state: RequestState) -> None:
        """Forgets a request and frees all that it holds."""
        if self._states.pop(state.request, None) is None:
            return
        self.scheduler.release_hold(state)
        for choice in list(state.choices.values()):
            self._finish(choice)
        if state in self._suspects:
            self._suspects.remove(state)

    def _take_outputs(self) -> list[Output]:
        outputs, self._outputs = self._outputs, []
        return outputs
