"""Who is in the batch, and who holds which blocks: the queue, the rows, and what each step computes.

The decisions are the pure functions of `policy`; here they are carried out. A sequence takes blocks as it
needs them. When they run out, the latest arrival gives up its row and blocks, and computes its tokens again
later, as far as the prefix cache has lost them.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Protocol

from torch import Tensor

from tokenstep.engine.block_manager import BlockManager, BlockTable, OutOfBlocks
from tokenstep.engine.config import EngineConfig
from tokenstep.engine.policy import TokenBudget, latest, may_enter, room_for_prompts, share_tokens
from tokenstep.engine.prefix_cache import BlockKey
from tokenstep.engine.sequence import NO_SLOT, Choice, Piece, RequestState
from tokenstep.engine.stats import Counters

by_arrival = attrgetter("arrival")


class Rows(Protocol):
    """The rows of the batch, as the runner has them on the device."""

    def admit(self, choice: Choice) -> None:
        """Sets up the row `choice.slot` for `choice`."""

    def release(self, slot: int) -> None:
        """Forgets what is in a row."""

    def set_table(self, slot: int, table: BlockTable, begin: int) -> None:
        """The blocks of a row are `table`, which has changed from index `begin` on."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks of all layers: (source, copy)."""


class Scheduler:
    """Queue, rows and blocks.

    Args:
        config: sizes.
        num_blocks: blocks of the KV cache.
        rows: is told who gets which row and which blocks.
        counters: counts preemptions.

    Attributes:
        blocks: who holds which block.
        waiting: sequences without a row, by arrival.
        running: sequences with a row, by arrival.
        free_slots: rows that nobody has.
    """

    def __init__(self, config: EngineConfig, num_blocks: int, rows: Rows, counters: Counters) -> None:
        self.blocks = BlockManager(num_blocks, config.block_size)
        self.waiting: list[Choice] = []
        self.running: list[Choice] = []
        self.free_slots = list(range(config.max_batch - 1, -1, -1))
        self._max_batch = config.max_batch
        self._reuses = config.prefix_cache
        self._budget = TokenBudget(config.prefill_tokens, config.mixed_tokens)
        self._rows = rows
        self._counters = counters
        self._holding: dict[RequestState, None] = {}  # in the order of their prompts' ends

    def add(self, choice: Choice) -> None:
        """Puts `choice` in the queue, at its place."""
        insort(self.waiting, choice, key=by_arrival)

    def schedule(
        self, settle: Callable[[], bool], only: RequestState | None = None
    ) -> tuple[list[Piece], list[Choice]]:
        """What is computed now, with blocks for it; and the choices that start from a prompt's hold.

        Args:
            settle: reads all that has been drawn, by which choices may end and blocks become free; returns
                whether there was anything. Nobody loses blocks before that.
            only: the one request that may compute.
        """
        has_made_room = False
        while True:
            running = _of(only, self.running)
            uncomputed = [choice.num_uncomputed for choice in running]
            shares = share_tokens(uncomputed, self._budget)
            if sum(map(self._blocks_needed, running, shares)) <= self.blocks.num_free:
                break
            if not settle():
                self._make_room()
                has_made_room = True
        pieces = [Piece.of(choice, count) for choice, count in zip(running, shares, strict=True) if count]
        self._rows.copy_blocks([copy for piece in pieces if (copy := self._reserve(piece))])
        starting: list[Choice] = []
        if self.waiting and not has_made_room:
            room = room_for_prompts(uncomputed, shares, self._budget)
            starting = self._let_in(pieces, room, only)
            while not self.running and self._release_a_hold():  # nothing else can be in the way
                starting = self._let_in(pieces, room, only)
        return pieces, starting

    def start_from_holds(self, only: RequestState | None = None) -> list[Choice]:
        """Seats those at the head of the queue that have nothing to compute."""
        return self._let_in([], 0, only)

    def remember(self, choice: Choice) -> None:
        """Tells the prefix cache of the blocks of `choice` that have become full."""
        size = self.blocks.block_size
        full = min(choice.num_computed, choice.num_known) // size
        if full > choice.num_remembered and self._reuses:
            keys = choice.block_keys(full, size)
            for index in range(choice.num_remembered, full):
                self.blocks.remember(choice.table[index], keys[index])
            choice.num_remembered = full

    def hold(self, choice: Choice, last_hidden: Tensor) -> None:
        """Keeps the prompt that `choice` has computed for the other choices of its request."""
        state = choice.state
        state.hold, state.last_hidden = self.blocks.fork(choice.table), last_hidden
        self._holding[state] = None

    def release_hold(self, state: RequestState) -> None:
        """Choices that start later will have to compute the prompt."""
        self.blocks.free(state.hold)
        state.last_hidden = None
        self._holding.pop(state, None)

    def remove(self, choice: Choice) -> None:
        """`choice` has ended: frees what it holds."""
        if choice.slot == NO_SLOT:
            self.waiting.remove(choice)
        else:
            self._unseat(choice)

    def restart(self) -> None:
        """Puts all that run back into the queue, and begins with an empty cache."""
        for choice in self.running:
            self.add(choice)
        for choice in self.waiting:
            choice.forget_computed()
        for state in self._holding:
            state.hold, state.last_hidden = [], None
        self._holding.clear()
        self.running.clear()
        self.blocks = BlockManager(self.blocks.num_blocks, self.blocks.block_size)
        self.free_slots = list(range(self._max_batch - 1, -1, -1))

    def clear(self) -> None:
        """Forgets everybody."""
        self.restart()
        self.waiting.clear()

    def _blocks_needed(self, choice: Choice, count: int) -> int:
        """Blocks to take before `count` more tokens of `choice` can be computed."""
        if not count:
            return 0
        blocks, table, position = self.blocks, choice.table, choice.num_computed
        needed = blocks.blocks_for(position + count) - len(table)
        if position % blocks.block_size and blocks.holders(table[position // blocks.block_size]) > 1:
            needed += 1
        return needed

    def _make_room(self) -> None:
        """Frees blocks: a prompt held for later choices, else a sequence that will be computed again."""
        if self._release_a_hold():
            return
        if len(self.running) <= 1:
            raise OutOfBlocks("tokenstep.engine: one sequence alone takes more blocks than there are")
        choice = self.running[latest([choice.arrival for choice in self.running])]
        self._unseat(choice)
        self.add(choice)
        self._counters.preemptions += 1

    def _reserve(self, piece: Piece) -> tuple[int, int] | None:
        """Takes the blocks that `piece` writes to; returns (source, copy) if one was shared."""
        choice, blocks = piece.choice, self.blocks
        table, position, held = choice.table, choice.num_computed, len(choice.table)
        copy = blocks.make_writable(table, position) if position % blocks.block_size else None
        blocks.grow(table, position + piece.count)
        if copy or len(table) > held:
            self._rows.set_table(choice.slot, table, held - 1 if copy else held)
        return copy

    def _release_a_hold(self) -> bool:
        """Gives up the newest hold; False if there is none."""
        if not self._holding:
            return False
        self.release_hold(next(reversed(self._holding)))
        return True

    def _let_in(self, pieces: list[Piece], room: int, only: RequestState | None) -> list[Choice]:
        """Seats those that wait, as long as there are rows, blocks and `room` for their tokens.

        Adds the pieces they compute to `pieces`; returns those that start from a hold.
        """
        starting: list[Choice] = []
        missing = [self._blocks_missing(choice) for choice in self.running]
        for choice in _of(only, self.waiting):
            if not self.free_slots:
                break
            if choice.starts_from_hold:
                if not self._enter_from_hold(choice, missing):
                    break
                starting.append(choice)
                missing.append(1)
                continue
            if not room or not self._enter(choice, missing):
                break
            piece = Piece.of(choice, min(room, choice.num_uncomputed))
            self._reserve(piece)
            pieces.append(piece)
            room -= piece.count
            missing.append(self._blocks_missing(choice))
        return starting

    def _enter_from_hold(self, choice: Choice, missing: Sequence[int]) -> bool:
        needed = 1 if choice.state.request.max_tokens > 1 else 0  # a copy of the last block, or a new one
        if not may_enter(needed, missing, self.blocks.num_free):
            return False
        choice.table = self.blocks.fork(choice.state.hold)
        choice.num_computed = len(choice.state.request.prompt)
        self._seat(choice)
        return True

    def _enter(self, choice: Choice, missing: Sequence[int]) -> bool:
        blocks, state = self.blocks, choice.state
        choice.table = blocks.reuse(self._reusable_keys(choice))
        if not may_enter(self._blocks_missing(choice), missing, blocks.num_free):
            blocks.free(choice.table)
            return False
        choice.num_remembered = len(choice.table)
        choice.num_computed = len(choice.table) * blocks.block_size
        if state.cached_tokens is None:
            state.cached_tokens = choice.num_computed
        self._seat(choice)
        return True

    def _reusable_keys(self, choice: Choice) -> list[BlockKey]:
        """Of the blocks that need not be computed: never the last token's, nor those yet to be scored."""
        if not self._reuses:
            return []
        state, size = choice.state, self.blocks.block_size
        limit = len(state.prompt_logprobs) if state.scores_prompt else choice.num_tokens - 1
        return choice.block_keys(limit // size, size)

    def _blocks_missing(self, choice: Choice) -> int:
        """Blocks that `choice` lacks for the tokens it has."""
        return self.blocks.blocks_for(choice.num_tokens) - len(choice.table)

    def _seat(self, choice: Choice) -> None:
        """Gives `choice` a row of the batch."""
        choice.slot = self.free_slots.pop()
        self._rows.admit(choice)
        self._rows.set_table(choice.slot, choice.table, 0)
        self.waiting.remove(choice)
        insort(self.running, choice, key=by_arrival)

    def _unseat(self, choice: Choice) -> None:
        """Takes row and blocks from `choice`."""
        self.running.remove(choice)
        self._rows.release(choice.slot)
        self.free_slots.append(choice.slot)
        self.blocks.free(choice.table)
        choice.forget_computed()


def _of(only: RequestState | None, choices: Sequence[Choice]) -> list[Choice]:
    return [choice for choice in choices if only is None or choice.state is only]
