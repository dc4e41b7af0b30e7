"""A pass in used room gives the bits of a pass in its own, with packed weights and with torch's."""

from __future__ import annotations

import pytest
import tiny_decoder as tiny
import torch

from tokenstep.models import DecoderModel, ForwardBatch, KVCache, Workspace
from tokenstep.models.layers import Linear
from tokenstep.models.memory import HugePages
from tokenstep.models.packed_linear import PackedLinear, PackedWeight


def packed(linear: Linear) -> PackedLinear:
    weight = PackedWeight("bfloat16", *linear.weight.shape, torch.bfloat16, HugePages())
    weight.pack(linear.weight.contiguous().view(torch.uint8))
    return PackedLinear(weight, linear.bias)


@pytest.fixture(params=["packed", "torch"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DecoderModel:
    monkeypatch.setattr(tiny, "HIDDEN", 64)
    monkeypatch.setattr(tiny, "INNER", 96)
    model = tiny.tiny_decoder(torch.bfloat16)
    if request.param == "packed":
        for layer in model.layers:
            for name in ("qkv", "output", "gate_up", "down"):
                setattr(layer, name, packed(getattr(layer, name)))
    return model


def batch(count: int, length: int) -> ForwardBatch:
    """`count` tokens of one sequence, the last at `length` - 1."""
    return ForwardBatch(
        tokens=torch.arange(length - count, length) % tiny.VOCAB,
        block_table=torch.arange(8, dtype=torch.int32)[None],
        seq_lens=torch.tensor([length], dtype=torch.int32),
        query_start=torch.tensor([0, count], dtype=torch.int32),
        max_query_len=count,
    )


def test_passes_of_any_sizes_share_a_workspace(model: DecoderModel) -> None:
    room = Workspace(model.config, model.dtype, model.device)
    sizes, results = (5, 1, 1, 7, 1, 20, 1), []
    for shared in (room, None):
        cache = KVCache.allocate(model.config, 8, 8, model.dtype)
        length, hidden = 0, []
        for count in sizes:
            length += count
            hidden.append(model.forward(batch(count, length), cache, shared))
        results.append(hidden)  # those of earlier passes must have stayed as they were
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
