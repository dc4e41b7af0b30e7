"""A model whose next token depends on every token in its paged cache, so that a wrong block shows."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from tokenstep.engine import Engine, FailureKind, FailureOutput, Output, PromptOutput, Request
from tokenstep.models import ForwardBatch, KVCache, ModelConfig, RopeConfig
from tokenstep.sampling import SamplingParams, sample

VOCAB = 50
PADDED_VOCAB = 64
CONTEXT = 96
IDLE_HASH = 1

CONFIG = ModelConfig(
    family="history",
    vocab_size=PADDED_VOCAB,
    hidden_size=1,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=1,
    max_position=CONTEXT,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    attention_scale=1.0,
    windows=(None,),
)


def hash_tokens(tokens: Iterable[int]) -> int:
    value = 7
    for token in tokens:
        value = (value * 31 + int(token) + 1) % 999983
    return value


def logits_after(value: int) -> torch.Tensor:
    """Logits [PADDED_VOCAB]; ids that the tokenizer doesn't have are the likeliest."""
    logits = 3 * torch.randn(PADDED_VOCAB, generator=torch.Generator().manual_seed(value))
    logits[VOCAB:] = 100.0
    return logits


class HistoryModel:
    """Stores tokens in their places of the cache; a hidden state is a hash of all that the table leads to."""

    config = CONFIG
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.batches: list[int] = []  # sequences of each forward pass
        self.prompt_tokens = 0
        self.poisoned: set[int] = set()  # hashes whose logits are NaN
        self.impossible: dict[int, int] = {}  # a token that cannot follow a hash
        self.interrupt = False
        self.fatal_token = -1  # a step that computes it fails
        self.failures_left = 0  # steps that fail, after the first four
        self.gate: threading.Event | None = None  # all but the first pass wait for it

    def forward(self, batch: ForwardBatch, cache: KVCache, room: object = None) -> torch.Tensor:
        if self.gate and self.batches:
            self.gate.wait(30)
        if self.interrupt:
            raise KeyboardInterrupt
        if self.fatal_token in batch.tokens:
            raise RuntimeError(f"token {self.fatal_token}")
        if self.failures_left and len(self.batches) > 3:
            self.failures_left -= 1
            raise RuntimeError("once")
        store = cache.k[0][:, :, 0, 0]
        count, size = len(batch.seq_lens), store.shape[1]
        starts = list(range(count + 1)) if batch.query_start is None else batch.query_start.tolist()
        self.batches.append(int((batch.seq_lens > 0).sum()))
        if batch.query_start is not None:
            self.prompt_tokens += len(batch.tokens)
        rows: list[int] = []
        for index in range(count):
            length = int(batch.seq_lens[index])
            new = batch.tokens[starts[index] : starts[index + 1]]
            if not length:  # an idle place: nothing is written
                rows.append(IDLE_HASH)
                continue
            assert 1 <= len(new) <= batch.max_query_len
            places = [(int(batch.block_table[index, i // size]), i % size) for i in range(length)]
            for place, token in zip(places[length - len(new) :], new.tolist(), strict=True):
                store[place] = token + 1
            seen = [int(store[place]) - 1 for place in places]
            rows += [hash_tokens(seen[: length - len(new) + i + 1]) for i in range(len(new))]
        hidden = torch.tensor(rows, dtype=torch.float64)[:, None]
        return hidden if batch.logit_rows is None else hidden[batch.logit_rows]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = [logits_after(int(value)) for value in hidden[:, 0]]
        for row, value in zip(rows, hidden[:, 0], strict=True):
            if int(value) in self.poisoned:
                row[3] = float("nan")
            if int(value) in self.impossible:
                row[self.impossible[int(value)]] = float("-inf")
        return torch.stack(rows)


@dataclass
class Generated:
    """What came out for one request."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    prompt_logprobs: list[float] | None = None
    failure: tuple[FailureKind, str] | None = None

    def take(self, output: Output) -> None:
        if isinstance(output, FailureOutput):
            self.failure = output.kind, output.message
        elif isinstance(output, PromptOutput):
            assert self.prompt_logprobs is None, "a prompt is reported once"
            self.prompt_logprobs = [entry.logprob for entry in output.logprobs]
        else:
            assert output.choice not in self.finish, "nothing follows the last token"
            self.tokens.setdefault(output.choice, []).append(output.token)
            if output.logprobs:
                self.logprobs.setdefault(output.choice, []).append(output.logprobs.logprob)
            if output.finish:
                self.finish[output.choice] = output.finish


def run_engine(engine: Engine, requests: Iterable[Request]) -> list[Generated]:
    """Adds all requests, steps until nothing is left."""
    generated = {request: Generated() for request in requests}
    for request in generated:
        engine.check(request)
        engine.add(request)
    idle = 0
    while engine.has_work:
        outputs = engine.step()
        idle = 0 if outputs else idle + 1
        assert idle < 100, "the engine makes no progress"
        for output in outputs:
            generated[output.request].take(output)
    return list(generated.values())


def alone(request: Request, choice: int) -> list[int]:
    """The tokens of one choice by the definition: no cache, no batch, the sampler called with lists."""
    params, output = request.choices[choice], []
    for position in range(request.max_tokens):
        drawn = sample(
            logits_after(hash_tokens([*request.prompt, *output]))[None, :VOCAB],
            **{name: getattr(params, name) for name in PARAMS},
            prompt_tokens=[list(request.prompt)],
            output_tokens=[output],
            position=position,
        )
        output.append(int(drawn.tokens[0]))
        if output[-1] in request.end_ids and len(output) >= request.min_tokens:
            break
    return output


PARAMS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "substream",
)


def choices(count: int, params: SamplingParams) -> list[SamplingParams]:
    return [replace(params, substream=index) for index in range(count)]
