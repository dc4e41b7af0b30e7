"""What the engine is asked to do, and what it reports back.

A request is one prompt and the choices wanted for it: sequences that go on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokenstep.models import LoraAdapter
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
        adapter: changes the model for this request; None: nothing does.
        cache_seed: names what, beside tokens and adapter, decides the contents of the KV cache: requests with
            another one share no blocks.
    """

    prompt: Sequence[int]
    choices: Sequence[SamplingParams]
    max_tokens: int
    min_tokens: int = 0
    end_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    adapter: LoraAdapter | None = None
    cache_seed: bytes = b""

    @property
    def cache_key(self) -> bytes:
        """What the keys of its blocks are chained to."""
        return self.cache_seed + (self.adapter.digest if self.adapter else b"")

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
