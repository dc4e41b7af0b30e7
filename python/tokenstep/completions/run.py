"""One completion request in flight: what the engine is asked, and what its outputs become."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tokenstep.completions.choice import ChoiceBuilder, Piece
from tokenstep.completions.errors import RequestError
from tokenstep.completions.fill_in import FillIn
from tokenstep.completions.logprobs import Entry, OffsetCounter, format_logprobs, prompt_entries
from tokenstep.completions.prompts import EncodedPrompt, check_length, encode_prompts
from tokenstep.completions.schema import (
    DEFAULT_MAX_TOKENS,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionRequest,
    PromptEcho,
    PromptTokensDetails,
    StreamOptions,
    Usage,
)
from tokenstep.engine import FailureOutput, Output, PromptOutput, Request
from tokenstep.models import LoraAdapter
from tokenstep.models.fields import shown
from tokenstep.models.tokenizer import Tokenizer
from tokenstep.sampling import SamplingParams


@dataclass(frozen=True)
class Limits:
    """What every request to one model shares.

    Attributes:
        tokenizer: the model's.
        vocab_size: token ids that requests may name.
        context: the most tokens of prompt and output.
        model_context: the same without regard to the KV cache.
        model_name: what the model is called.
        system_fingerprint: names all that decides the tokens.
        default_seed: for requests without a seed; None: fresh entropy for each.
        default_max_tokens: for requests without max_tokens; cut to what the context has room for.
        aliases: other names by which requests may call the model.
        adapters: those that requests may name; may change while the model serves.
    """

    tokenizer: Tokenizer
    vocab_size: int
    context: int
    model_context: int
    model_name: str
    system_fingerprint: str
    default_seed: int | None = None
    default_max_tokens: int = DEFAULT_MAX_TOKENS
    aliases: frozenset[str] = frozenset()
    adapters: Mapping[str, LoraAdapter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Update:
    """A piece of choice `index`, the tokens generated for all choices by then, whether it is the last."""

    index: int
    piece: Piece
    completion_tokens: int
    is_last: bool = False


class CompletionRun:
    """A request and all its choices; choice i belongs to prompt i // choices_per_prompt.

    The engine's thread files outputs with `take`, another one takes what has come from `ready`.

    Args:
        request: what the caller wants; raises RequestError if it can't be served.
        limits: what the model allows.

    Attributes:
        requests: what the engine is to do, one request a prompt.
        ready: what nobody has taken yet.
        failure: why the request can't go on; None as long as it can.
    """

    def __init__(self, request: CompletionRequest, limits: Limits) -> None:
        self._request = request
        self._limits = limits
        # looked up once: it may be removed while the request goes on
        self._adapter = None if request.peft is None else limits.adapters.get(request.peft)
        self._check(request)
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.ready: deque[Update] = deque()
        self.failure: FailureOutput | None = None
        self.choices_per_prompt = request.best_of or request.n
        self._all_equal = request.temperature == 0  # then one computed choice serves as all of them
        self._fill_in = None if request.suffix is None else FillIn(limits.tokenizer)
        self.prompts = encode_prompts(request, limits.tokenizer, limits.vocab_size, self._fill_in)
        self._ranks = (request.best_of or 1) > 1 and not request.stream
        self._stop_reasons = self._find_stop_reasons()
        self._seed = self._choose_seed()
        self._prompt_entries: list[list[Entry]] = [[] for _ in self.prompts]
        self._has_prompt_ids: set[int] = set()  # choices whose chunks have said them
        self.requests = [self._engine_request(index, prompt) for index, prompt in enumerate(self.prompts)]
        self._prompt_index = {request: index for index, request in enumerate(self.requests)}
        self.builders = [
            self._builder(prompt) for prompt in self.prompts for _ in range(self.choices_per_prompt)
        ]
        self._open_choices = len(self.builders)
        self._cached_tokens = 0
        self._num_generated = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come to `ready`."""
        return not self._open_choices or self.failure is not None

    def take(self, output: Output) -> list[tuple[Request, int]]:
        """Files one output of the engine; returns the choices that it may stop computing."""
        if isinstance(output, FailureOutput):
            self.failure = output
            return []
        prompt = self._prompt_index[output.request]
        first = prompt * self.choices_per_prompt
        choices = range(first, first + self.choices_per_prompt)
        if isinstance(output, PromptOutput):
            self._take_prompt(output, prompt, choices)
            return []
        ended = False
        for index in choices if self._all_equal else (first + output.choice,):
            builder = self.builders[index]
            if not builder.finished:
                self._num_generated += 1
                self._file(index, builder.push(output.token, output.logprobs, output.finish))
                ended = builder.finished and not output.finish
        return [(output.request, output.choice)] if ended else []

    def completion(self, pieces: Sequence[Piece]) -> Completion:
        """The whole response; `pieces` has all of each choice."""
        choices = []
        for prompt in range(len(self.prompts)):
            first = prompt * self.choices_per_prompt
            kept = list(range(first, first + self.choices_per_prompt))
            if self._ranks:
                kept.sort(key=self._mean_logprob, reverse=True)
            for rank, index in enumerate(kept[: self._request.n]):
                choice = self._choice(prompt * self._request.n + rank, prompt, pieces[index])
                if self._request.return_token_ids:
                    choice.prompt_token_ids = self.prompts[prompt].ids
                choices.append(choice)
        return Completion(
            id=self.id,
            created=self.created,
            model=self._limits.model_name,
            system_fingerprint=self._system_fingerprint,
            choices=choices,
            usage=self._usage(self._num_generated),
            prompt=self._prompt_echo(),
        )

    def prompt_scores(self) -> list[list[float]]:
        """Log probabilities of each prompt's tokens but the first."""
        return [
            [entry.logprobs.logprob for entry in entries if entry.logprobs is not None]
            for entries in self._prompt_entries
        ]

    def chunk(self, update: Update) -> CompletionChunk | None:
        """The frame for an update; None if it has nothing that the caller asked for."""
        index, piece = update.index, update.piece
        asked_ids = self._request.return_token_ids
        if not (piece.text or piece.entries or piece.finish_reason or (asked_ids and piece.token_ids)):
            return None
        prompt = index // self.choices_per_prompt
        choice = self._choice(index, prompt, piece)
        if asked_ids and index not in self._has_prompt_ids:
            choice.prompt_token_ids = self.prompts[prompt].ids
            self._has_prompt_ids.add(index)
        chunk = self._frame([choice])
        if self._stream_options.continuous_usage_stats:
            chunk.usage = self._usage(update.completion_tokens)
        if update.is_last:
            chunk.prompt = self._prompt_echo()
        return chunk

    def usage_chunk(self) -> CompletionChunk | None:
        """The extra last frame; None if the caller doesn't want it."""
        if not self._stream_options.include_usage:
            return None
        chunk = self._frame([])
        chunk.usage = self._usage(self._num_generated)
        return chunk

    def _file(self, index: int, piece: Piece) -> None:
        """Makes a piece ready. Only the engine's thread counts, so that no count runs ahead of its piece."""
        self._open_choices -= piece.finish_reason is not None
        self.ready.append(Update(index, piece, self._num_generated, not self._open_choices))

    @property
    def _system_fingerprint(self) -> str:
        suffix = "" if self._adapter is None else f"-peft-{self._adapter.id}"
        return self._limits.system_fingerprint + suffix

    @property
    def _stream_options(self) -> StreamOptions:
        return self._request.stream_options or StreamOptions()

    def _check(self, request: CompletionRequest) -> None:
        """What needs the model to be checked."""
        if request.model not in (None, self._limits.model_name, *self._limits.aliases):
            raise RequestError(
                f"model = {request.model!r}, expected {self._limits.model_name!r}",
                param="model",
                code="model_not_found",
            )
        if request.peft is not None and self._adapter is None:
            names = ", ".join(map(repr, sorted(self._limits.adapters))) or "none: no adapter is served"
            raise RequestError(
                f"peft = {shown(request.peft)}, expected {names}", param="peft", code="adapter_not_found"
            )
        prompts = request.prompt if isinstance(request.prompt, list) else [request.prompt]
        for name, text in (*(("prompt", prompt) for prompt in prompts), ("suffix", request.suffix)):
            if isinstance(text, str):
                check_length(text, name, name, self._limits.tokenizer, self._limits.context)
        size = self._limits.vocab_size
        for key in request.logit_bias:
            if int(key) >= size:
                raise RequestError(
                    f"logit_bias: key {key!r}, expected a token id < {size}", param="logit_bias"
                )
        for token in request.stop_token_ids:
            if not 0 <= token < size:
                raise RequestError(
                    f"stop_token_ids: {token}, expected 0 ≤ token id < {size}", param="stop_token_ids"
                )

    def _find_stop_reasons(self) -> dict[int, str | int | None]:
        """The tokens that end the text, and what is given as the reason."""
        request, tokenizer = self._request, self._limits.tokenizer
        reasons: dict[int, str | int | None] = {}
        if not request.ignore_eos:
            reasons.update(dict.fromkeys(tokenizer.eos_token_ids))
            reasons.update(dict.fromkeys(self._fill_in.end_ids if self._fill_in else ()))
        reasons.update({token: token for token in request.stop_token_ids})
        for stop in request.stop:
            token = tokenizer.token_to_id(stop)
            if token is not None and tokenizer.is_special(token):
                reasons[token] = stop
        return reasons

    def _choose_seed(self) -> int:
        for seed in (self._request.seed, self._limits.default_seed):
            if seed is not None:
                return seed
        return secrets.randbits(64)

    def _engine_request(self, index: int, prompt: EncodedPrompt) -> Request:
        request = self._request
        bias = {int(key): value or 0.0 for key, value in request.logit_bias.items()}
        logprobs = 0 if self._ranks and request.logprobs is None else request.logprobs
        choices = [
            SamplingParams(
                temperature=request.temperature,
                top_k=min(request.top_k, self._limits.vocab_size),
                top_p=request.top_p,
                min_p=request.min_p,
                repetition_penalty=request.repetition_penalty,
                presence_penalty=request.presence_penalty,
                frequency_penalty=request.frequency_penalty,
                logit_bias=bias,
                seed=self._seed,
                substream=index << 16 | choice,
                logprobs=logprobs,
            )
            for choice in range(1 if self._all_equal else self.choices_per_prompt)
        ]
        scores_prompt = request.loglikelihood or (request.echo and request.logprobs is not None)
        return Request(
            prompt=prompt.ids,
            choices=choices,
            max_tokens=self._max_tokens(prompt),
            min_tokens=request.min_tokens,
            end_ids=frozenset(self._stop_reasons),
            logprobs=logprobs,
            prompt_logprobs=(request.logprobs or 0) if scores_prompt else None,
            adapter=self._adapter,
        )

    def _max_tokens(self, prompt: EncodedPrompt) -> int:
        """Tokens that may be generated after `prompt`; raises RequestError if they don't fit the context."""
        explicit = self._request.given("max_tokens")
        wanted = self._request.max_tokens if explicit else self._limits.default_max_tokens
        prompt_tokens, context = len(prompt.ids), self._limits.context
        room = context - prompt_tokens
        if room >= wanted:
            return wanted
        if room >= 1 and not explicit:
            return room
        why = " (what the KV cache holds: see kv_tokens)" if context < self._limits.model_context else ""
        raise RequestError(
            f"This model's maximum context length is {context} tokens{why}. However, you requested"
            f" {prompt_tokens + wanted} tokens ({prompt_tokens} in the {prompt.name}, {wanted} in the"
            " completion).",
            param="max_tokens" if explicit and room >= 0 else "prompt",
            code="context_length_exceeded",
        )

    def _builder(self, prompt: EncodedPrompt) -> ChoiceBuilder:
        return ChoiceBuilder(
            prompt.detokenizer.fork(),
            prompt.offsets.fork() if prompt.offsets else None,
            stops=self._request.stop,
            min_tokens=self._request.min_tokens,
            stop_reasons=self._stop_reasons,
        )

    def _take_prompt(self, output: PromptOutput, prompt: int, choices: range) -> None:
        """The prompt has been computed: echoes begin, and choices without tokens end."""
        request = self._request
        if output.request.prompt_logprobs is not None:
            counter = OffsetCounter(self._limits.tokenizer, request.skip_special_tokens)
            self._prompt_entries[prompt] = prompt_entries(self.prompts[prompt].ids, output.logprobs, counter)
        ends = not output.request.max_tokens
        self._cached_tokens += output.cached_tokens
        for index in choices:
            self.builders[index].finished = ends
            piece = Piece(finish_reason="length" if ends else None)
            if request.echo:
                piece.text = self.prompts[prompt].whole_text if ends else self.prompts[prompt].text
                piece.entries = list(self._prompt_entries[prompt]) if request.logprobs is not None else []
            self._file(index, piece)

    def _choice(self, index: int, prompt: int, piece: Piece) -> CompletionChoice:
        logprobs = None
        if self._request.logprobs is not None:
            logprobs = format_logprobs(piece.entries, self._limits.tokenizer)
        return CompletionChoice(
            index=index,
            text=piece.text,
            logprobs=logprobs,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            token_ids=piece.token_ids if self._request.return_token_ids else None,
        )

    def _frame(self, choices: list[CompletionChoice]) -> CompletionChunk:
        return CompletionChunk(
            id=self.id,
            created=self.created,
            model=self._limits.model_name,
            system_fingerprint=self._system_fingerprint,
            choices=choices,
        )

    def _prompt_echo(self) -> list[PromptEcho] | None:
        if not (self._request.echo or self._request.loglikelihood):
            return None
        return [
            PromptEcho(
                text=prompt.whole_text,
                logprobs=format_logprobs(entries, self._limits.tokenizer) if entries else None,
            )
            for prompt, entries in zip(self.prompts, self._prompt_entries, strict=True)
        ]

    def _mean_logprob(self, index: int) -> float:
        builder = self.builders[index]
        return builder.logprob_sum / max(1, builder.num_tokens)

    def _usage(self, completion_tokens: int) -> Usage:
        prompt_tokens = sum(len(prompt.ids) for prompt in self.prompts)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._cached_tokens),
        )
