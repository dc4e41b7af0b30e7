"""A model that recites: after a sequence of n tokens it wants the n-th of a script, whatever came before."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from byte_tokenizer import BEGIN, ByteTokenizer

from tokenstep.completions.schema import Completion, CompletionRequest
from tokenstep.completions.service import CompletionService
from tokenstep.engine import Engine, EngineConfig
from tokenstep.models import ForwardBatch, KVCache, ModelConfig, RopeConfig

CONTEXT = 64
GREEDY: dict[str, Any] = {"prompt": [BEGIN], "temperature": 0, "max_tokens": 12}
CONFIDENCE = 8.0  # the logit of the scripted token; the others follow a fixed pattern from -1 to 1


def config(vocab_size: int) -> ModelConfig:
    return ModelConfig(
        family="scripted",
        vocab_size=vocab_size,
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


class ScriptedModel:
    """Hidden states are lengths. `script[i]` follows a sequence of i + 1 tokens."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, script: Sequence[int], vocab_size: int = ByteTokenizer.vocab_size) -> None:
        self.config = config(vocab_size)
        self.script = list(script)
        self.poisoned_length = 0  # logits behind a sequence of this length are NaN
        self.broken = False
        self.hold_at = 0  # before it goes on from a sequence of this length, it waits for the gate
        self.gate = threading.Event()
        self.rows: list[int] = []  # of each decoding step

    def forward(self, batch: ForwardBatch, cache: KVCache, room: object = None) -> torch.Tensor:
        if self.broken:
            raise RuntimeError("the model is broken")
        ends = batch.seq_lens.tolist()
        if self.hold_at and self.hold_at in ends:
            self.gate.wait(30)
        if batch.query_start is None:
            self.rows.append(len(ends))
            return torch.tensor(ends, dtype=torch.float32)[:, None]
        starts = batch.query_start.tolist()
        counts = [end - start for start, end in pairwise(starts)]
        lengths = [
            length
            for end, count in zip(ends, counts, strict=True)
            for length in range(end - count + 1, end + 1)
        ]
        hidden = torch.tensor(lengths, dtype=torch.float32)[:, None]
        return hidden if batch.logit_rows is None else hidden[batch.logit_rows]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.logits_after(int(length)) for length in hidden[:, 0]])

    def logits_after(self, length: int) -> torch.Tensor:
        """[vocab_size] behind a sequence of `length` tokens."""
        logits = torch.sin(torch.arange(self.config.vocab_size) * 0.7 + length)
        if length <= len(self.script):
            logits[self.script[length - 1]] = CONFIDENCE
        if length == self.poisoned_length:
            logits[7] = float("nan")
        return logits


def make_service(
    model: ScriptedModel,
    *,
    strips_first_space: bool = False,
    default_seed: int | None = None,
    **sizes: int,
) -> CompletionService:
    """A service over `model` with the byte tokenizer."""
    tokenizer = ByteTokenizer(strips_first_space)
    engine = Engine(model, tokenizer.vocab_size, EngineConfig(**{"max_batch": 8, "kv_tokens": 512, **sizes}))
    return CompletionService(
        engine,
        tokenizer,
        model_name="scripted",
        system_fingerprint="fingerprint",
        default_seed=default_seed,
    )


def recite(text: str | bytes | Sequence[int], prompt_length: int = 1) -> ScriptedModel:
    """A model that writes `text` after a prompt of `prompt_length` tokens, then begin tokens."""
    tokens = list(text.encode()) if isinstance(text, str) else list(text)
    return ScriptedModel([BEGIN] * (prompt_length - 1) + tokens)


def complete(service: CompletionService, **fields: Any) -> Completion:
    return service.complete(CompletionRequest.parse({**GREEDY, **fields}))


def holds_nothing(service: CompletionService) -> bool:
    """Whether no block and no row is held now."""
    engine = service.engine
    return (
        not engine.has_work
        and engine.blocks.num_free == engine.blocks.num_blocks
        and len(engine.scheduler.free_slots) == engine.config.max_batch
    )


def is_idle(service: CompletionService) -> bool:
    """Whether no block and no row is held soon: what has been cancelled goes before the next step."""
    deadline = time.monotonic() + 10
    while not holds_nothing(service) and time.monotonic() < deadline:
        time.sleep(0.001)
    return holds_nothing(service)
