"""A decoder with random weights, of sizes at which torch's results depend on how much is computed at once."""

from __future__ import annotations

import torch

from tokenstep.models import DecoderModel, ModelConfig, RopeConfig
from tokenstep.models.decoder import Layer
from tokenstep.models.layers import Linear, Projection, RMSNorm
from tokenstep.models.memory import HugePages
from tokenstep.models.packed_linear import PackedLinear, PackedWeight
from tokenstep.models.rope import build_rope

VOCAB = 97
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 48, 1000, 4, 2, 16


def tiny_decoder(
    dtype: torch.dtype,
    activation: str = "silu",
    softcap: float | None = None,
    form: str | None = None,
    device: str = "cpu",
) -> DecoderModel:
    """With a form, all matrices but the embedding are packed in it, and have multiples of 32 columns."""
    hidden, inner = (HIDDEN, INNER) if form is None else (64, 992)
    config = ModelConfig(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_layers=2,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=inner,
        max_position=256,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10000.0),
        attention_scale=HEAD_DIM**-0.5,
        windows=(None, 20),
        activation=activation,
        final_softcap=softcap,
    )
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return (2 * torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype).to(device)

    def linear(rows: int, columns: int, bias: bool = False) -> Projection:
        weight, added = random(rows, columns), random(rows) if bias else None
        if form is None:
            return Linear(weight, added)
        from gguf import GGMLQuantizationType, quants

        packed = PackedWeight(form, rows, columns, dtype, HugePages())
        packed.pack(quants.quantize(weight.float().numpy(), GGMLQuantizationType[form.upper()]))
        return PackedLinear(packed, added)

    def norm() -> RMSNorm:
        return RMSNorm((1 + 0.1 * torch.randn(hidden, generator=generator)).to(device), 1e-5, dtype)

    layers = [
        Layer(
            attention_norm=norm(),
            qkv=linear((HEADS + 2 * KV_HEADS) * HEAD_DIM, hidden),
            output=linear(hidden, HEADS * HEAD_DIM),
            mlp_norm=norm(),
            gate_up=linear(2 * inner, hidden, bias=True),
            down=linear(hidden, inner),
            window=config.windows[index],
        )
        for index in range(2)
    ]
    rope = build_rope(config.rope, HEAD_DIM, config.max_position, torch.device(device))
    return DecoderModel(config, random(VOCAB, hidden), layers, norm(), linear(VOCAB, hidden), rope)
