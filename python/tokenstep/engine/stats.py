"""What an engine tells about its work: counters, a snapshot, and observations as they happen."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenstep.engine.request import FailureKind


@dataclass
class Counters:
    """Totals since the engine was made.

    Attributes:
        steps: steps that computed something.
        prompt_tokens: prompt tokens of all requests whose prompt has been computed, found in the cache or
            not.
        cached_tokens: of those, the ones that the prefix cache had.
        generated_tokens: tokens drawn.
        computed_tokens: tokens that went through the model, those computed again after a preemption included.
        preemptions: sequences that lost their blocks to others and were computed again.
        failures: requests that failed, by kind.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    preemptions: int = 0
    failures: dict[FailureKind, int] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineStats:
    """An engine at one moment, between two steps.

    Attributes:
        running: sequences that hold a row of the batch.
        blocks_used: blocks of the KV cache that are held.
        blocks_cached: blocks that nobody holds but whose contents can be used again.
        blocks_total: blocks of the KV cache.
        block_size: tokens of a block.
        cache_bytes: what the KV cache takes once all of it has been written.
        counters: totals.
        waiting: requests for which nothing has been computed yet.
        waiting_tokens: the most tokens that these may take, prompts and outputs.
    """

    running: int
    blocks_used: int
    blocks_cached: int
    blocks_total: int
    block_size: int
    cache_bytes: int
    counters: Counters
    waiting: int = 0
    waiting_tokens: int = 0


class Observer:
    """Told what happens, in the engine's thread: a method must be quick. This one ignores all of it."""

    def first_token(self, seconds: float) -> None:
        """The first token of what was submitted together came after so long."""

    def next_token(self, seconds: float) -> None:
        """A choice's next token came this long after the one before."""

    def finished(self, seconds: float) -> None:
        """All that was submitted together was done after so long."""

    def failed(self, kind: FailureKind) -> None:
        """A request failed."""

    def cancelled(self) -> None:
        """A request was cancelled before it was done."""
