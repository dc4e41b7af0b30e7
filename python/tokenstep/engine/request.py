"""What the engine is asked to do, the sequences it makes of that, and what it reports back.

A request is one prompt and the number of choices wanted for it. The prompt is computed and stored once; each
choice is a sequence that goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from tokenstep.engine.block_manager import BlockTable
from tokenstep.sampling import SamplingParams

FinishReason = Literal["stop", "length"]
FailureKind = Literal["bad_logits", "no_token_left", "broken_step", "stopped", "forked"]


@dataclass(eq=False)
class Request:
    """One prompt and what is to follow it.

    Attributes:
        prompt: token ids, at least one.
        choices: the sampling parameters of each choice.
        max_tokens: tokens to generate at most; 0 computes the prompt alone.
        min_tokens: no token before this one (counted from 1) ends a choice.
        end_ids: tokens that end a choice.
        logprobs: top log probabilities wanted beside the token's own; None: no log probabilities.
        prompt_logprobs: the same for the prompt's tokens.
    """

    prompt: Sequence[int]
    choices: Sequence[SamplingParams]
    max_tokens: int
    min_tokens: int = 0
    end_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def max_total_tokens(self) -> int:
        """The most tokens that may be computed for it."""
        return len(self.prompt) + len(self.choices) * self.max_tokens


@dataclass(slots=True)
class TokenLogprobs:
    """A token's log probability in the raw distribution, its rank (from 1), and the most likely ids."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True)
class TokenOutput:
    """One more token of one choice; `finish` is set on its last."""

    request: Request
    choice: int
    token: int
    logprobs: TokenLogprobs | None
    finish: FinishReason | None


@dataclass(slots=True)
class PromptOutput:
    """The prompt has been computed.

    `logprobs`: of its tokens but the first, if they were wanted. `cached_tokens`: found in the prefix cache.
    """

    request: Request
    logprobs: list[TokenLogprobs]
    cached_tokens: int = 0


@dataclass(slots=True)
class FailureOutput:
    """The request cannot go on; none of its choices will."""

    request: Request
    kind: FailureKind
    message: str


Output = TokenOutput | PromptOutput | FailureOutput


@dataclass(eq=False)
class Choice:
    """A sequence that decodes: its blocks, its row in the batch and how far it is."""

    state: RequestState
    index: int
    slot: int
    table: BlockTable
    num_generated: int = 0
    last_token: int = -1

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output."""
        return len(self.state.request.prompt) + self.num_generated


@dataclass(eq=False)
class RequestState:
    """How far the engine is with a request.

    Attributes:
        request: what was asked for.
        table: the prompt's blocks as the request holds them: until its last choice has its own.
        prompt_table: the same block ids, for computing the prompt.
        num_computed: prompt tokens in the cache.
        last_hidden: [1, hidden_size], the prompt's last hidden state, from which every choice starts.
        next_choice: the first choice that has no row yet.
        granted: choices that have a row and blocks but no token yet.
        live: choices that have a row.
        copies: (source, copy) blocks to be copied before the granted choices write.
        prompt_logprobs: so far.
    """

    request: Request
    table: BlockTable = field(default_factory=list)
    prompt_table: BlockTable = field(default_factory=list)
    num_computed: int = 0
    last_hidden: Tensor | None = None
    next_choice: int = 0
    granted: list[Choice] = field(default_factory=list)
    live: list[Choice] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def num_pending(self) -> int:
        """Choices that wait for a row."""
        return len(self.request.choices) - self.next_choice if self.request.max_tokens else 0
