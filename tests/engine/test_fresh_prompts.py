"""Prompts by torch's attention, as on a GPU: the same appended bits, hidden states equal up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from tiny_decoder import VOCAB, tiny_decoder

from tokenstep.models import DecoderModel, ForwardBatch, KVCache, Span, prefill

BLOCK = 8
Counts = list[tuple[int, int]]
"""Of each sequence: tokens that are cached already, new ones."""

LIMITS = {torch.float32: 4e-6, torch.bfloat16: 0.03}  # relative errors; seen: 1.2e-6 and 0.011
LONG = prefill.SDPA_TOKENS
BATCHES: list[Counts] = [
    [(0, LONG)],
    [(0, LONG + 3), (0, 2 * LONG - 60)],
    [(5, 1), (0, LONG + 1), (17, 9), (30, 1), (0, 4)],
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each prompt that torch has attended to."""
    lengths: list[int] = []
    original: Callable[..., torch.Tensor] = prefill._attend_to_itself

    def counted(q: torch.Tensor, *rest: Any) -> torch.Tensor:
        lengths.append(len(q))
        return original(q, *rest)

    monkeypatch.setattr(prefill, "_attend_to_itself", counted)
    return lengths


def passes(model: DecoderModel, counts: Counts, uses_sdpa: bool) -> tuple[torch.Tensor, KVCache]:
    """First what is to be cached, then all new tokens in one pass; hidden states of these."""
    model.uses_sdpa = False
    generator = torch.Generator().manual_seed(len(counts))
    width = max(-(-(cached + new) // BLOCK) for cached, new in counts)
    table = torch.randperm(len(counts) * width, generator=generator).to(torch.int32).view(len(counts), width)
    cache = KVCache.allocate(model.config, table.numel(), BLOCK, model.dtype)
    hidden = torch.empty(0)
    for step in (0, 1):
        new = [count[step] for count in counts]
        starts = list(accumulate(new, initial=0))
        begins = [0 if step == 0 else cached for cached, _ in counts]
        lengths = [begin + count for begin, count in zip(begins, new, strict=True)]
        model.uses_sdpa = uses_sdpa and step == 1
        hidden = model.forward(
            ForwardBatch(
                tokens=torch.randint(0, VOCAB, (starts[-1],), generator=generator),
                block_table=table,
                seq_lens=torch.tensor(lengths, dtype=torch.int32),
                query_start=torch.tensor(starts, dtype=torch.int32),
                max_query_len=max(1, *new),
                fresh=[
                    Span(index, *span) for index, span in enumerate(pairwise(starts)) if not begins[index]
                ],
            ),
            cache,
        )
    return hidden, cache


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of all numbers together, as a share of their size."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("counts", BATCHES, ids=lambda counts: f"{len(counts)} sequences")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_attention_and_ours_agree(dtype: torch.dtype, counts: Counts, calls: list[int]) -> None:
    model = tiny_decoder(dtype)
    model.layers = [replace(layer, window=None) for layer in model.layers]
    ours, our_cache = passes(model, counts, uses_sdpa=False)
    assert calls == []
    torchs, torchs_cache = passes(model, counts, uses_sdpa=True)
    assert calls == 2 * [new for cached, new in counts if not cached and new >= LONG]
    # the first layer's keys and values are computed before any attention
    assert torch.equal(our_cache.k[0], torchs_cache.k[0])
    assert torch.equal(our_cache.v[0], torchs_cache.v[0])
    assert relative_error(torchs, ours) < LIMITS[dtype]
    assert relative_error(torchs_cache.v[1], our_cache.v[1]) < LIMITS[dtype]


@pytest.mark.parametrize(
    ("window", "softcap", "by_torch"),
    [(LONG, None, True), (LONG - 1, None, False), (None, 5.0, False), (LONG + 9, 5.0, False)],
)
def test_what_torch_cannot_compute_is_ours_bit_for_bit(
    window: int | None, softcap: float | None, by_torch: bool, calls: list[int]
) -> None:
    model = tiny_decoder(torch.float32)
    model.layers = [replace(layer, window=window) for layer in model.layers]
    model.config = replace(model.config, attention_softcap=softcap)
    counts = [(0, LONG), (3, 1)]
    ours, _ = passes(model, counts, uses_sdpa=False)
    chosen, _ = passes(model, counts, uses_sdpa=True)
    assert bool(calls) == by_torch
    if by_torch:
        assert relative_error(chosen, ours) < LIMITS[torch.float32]
    else:
        assert torch.equal(chosen, ours)


def test_short_prompts_stay_together_in_one_launch(calls: list[int]) -> None:
    passes(tiny_decoder(torch.float32), [(0, LONG - 1)] * 3, uses_sdpa=True)
    assert calls == []


def test_on_a_cpu_and_with_batch_invariant_there_is_one_path() -> None:
    model = tiny_decoder(torch.float32)
    assert not model.uses_sdpa
    assert not model.as_batch_invariant().uses_sdpa
