"""The sequences that the engine makes of a request, and how far it is with them.

Who computes what is decided by counts alone: a token that has been drawn on the device counts from the moment
its step is launched, though the host reads it later.

A request begins as its first choice alone, which computes the prompt. Then the others exist too: as long as
the request keeps the prompt's blocks and last hidden state (its hold), they start from there; when it has had
to give these up, they compute the prompt as if they had come alone, with what the prefix cache still has.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from tokenstep.engine.block_manager import BlockTable
from tokenstep.engine.policy import Arrival
from tokenstep.engine.prefix_cache import BlockKey, first_key, next_key
from tokenstep.engine.request import Request, TokenLogprobs
from tokenstep.sampling import SamplingParams

NO_SLOT = -1


@dataclass(eq=False)
class RequestState:
    """How far the engine is with a request.

    Attributes:
        request: what was asked for.
        number: requests that came before it.
        choices: those that exist and haven't ended, by index.
        prompt_is_done: whether the prompt has been computed and reported.
        prompt_logprobs: so far.
        cached_tokens: prompt tokens that the prefix cache had; None until the prompt has been begun.
        hold: the prompt's blocks, for choices that start later.
        last_hidden: [1, hidden_size], the prompt's last hidden state; None without a hold.
    """

    request: Request
    number: int
    choices: dict[int, Choice] = field(default_factory=dict)
    prompt_is_done: bool = False
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached_tokens: int | None = None
    hold: BlockTable = field(default_factory=list)
    last_hidden: Tensor | None = None

    @property
    def scores_prompt(self) -> bool:
        """Whether log probabilities of prompt tokens are still to be computed."""
        return self.request.prompt_logprobs is not None and not self.prompt_is_done


@dataclass(eq=False)
class Choice:
    """One sequence: the prompt and its own output.

    Attributes:
        state: of its request.
        index: among the request's choices.
        output: tokens drawn, as far as they have been read.
        num_unread: tokens drawn beyond these.
        table: its blocks.
        num_computed: its tokens that are in the cache, or will be once the launched steps have run.
        slot: its row of the batch; NO_SLOT while it waits.
        is_decoding: its last token is one that it has drawn in this slot: the device has it there.
        keys: of its full blocks, as far as they have been asked for.
        num_remembered: its blocks that the prefix cache has been told of.
    """

    state: RequestState
    index: int
    output: list[int] = field(default_factory=list)
    num_unread: int = 0
    table: BlockTable = field(default_factory=list)
    num_computed: int = 0
    slot: int = NO_SLOT
    is_decoding: bool = False
    keys: list[BlockKey] = field(default_factory=list)
    num_remembered: int = 0

    @property
    def arrival(self) -> Arrival:
        """Its place in the order."""
        return self.state.number, self.index

    @property
    def params(self) -> SamplingParams:
        """How its tokens are drawn."""
        return self.state.request.choices[self.index]

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes of it; what launched steps still draw for it is dropped."""
        return self.index not in self.state.choices

    @property
    def num_drawn(self) -> int:
        """Tokens of the output, read or not."""
        return len(self.output) + self.num_unread

    @property
    def num_known(self) -> int:
        """Tokens of prompt and output that the host knows."""
        return len(self.state.request.prompt) + len(self.output)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output, read or not."""
        return self.num_known + self.num_unread

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute before the next can be drawn; one while it decodes, none behind its last."""
        if self.num_unread and self.num_drawn >= self.state.request.max_tokens:
            return 0
        return self.num_tokens - self.num_computed

    @property
    def starts_from_hold(self) -> bool:
        """Whether it can begin without computing anything."""
        return self.state.last_hidden is not None and not self.num_drawn

    def forget_computed(self) -> None:
        """It holds neither row nor blocks any more; what hasn't been read is drawn again."""
        self.table = []
        self.slot, self.num_computed, self.num_remembered = NO_SLOT, 0, 0
        self.num_unread, self.is_decoding = 0, False

    def tokens(self, begin: int, end: int) -> list[int]:
        """Its tokens from `begin` to before `end`."""
        prompt = self.state.request.prompt
        length = len(prompt)
        return [*prompt[begin:end], *self.output[max(0, begin - length) : max(0, end - length)]]

    def block_keys(self, count: int, block_size: int) -> list[BlockKey]:
        """The keys of its first `count` blocks, which must be full."""
        if not self.keys and count:
            start = first_key(self.state.request.cache_key)
            self.keys.append(next_key(start, self.tokens(0, block_size)))
        while len(self.keys) < count:
            begin = len(self.keys) * block_size
            self.keys.append(next_key(self.keys[-1], self.tokens(begin, begin + block_size)))
        return self.keys[:count]


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` tokens of a sequence to be computed; the last `num_rows` hidden states are wanted."""

    choice: Choice
    count: int
    num_rows: int = 1

    @classmethod
    def of(cls, choice: Choice, count: int) -> Piece:
        """The next `count` tokens of `choice`."""
        return cls(choice, count, count if choice.state.scores_prompt else 1)
