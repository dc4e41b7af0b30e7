"""A decoder with random weights, of sizes at which torch's results depend on how much is computed at once."""

from __future__ import annotations

import torch

from tokenstep.models import DecoderModel, ModelConfig, RopeConfig
from tokenstep.models.decoder import Layer
from tokenstep.models.layers import Linear, RMSNorm
from tokenstep.models.rope import build_rope

VOCAB = 97
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 48, 1000, 4, 2, 16


def tiny_decoder(dtype: torch.dtype, activation: str = "silu", softcap: float | None = None) -> DecoderModel:
    config = ModelConfig(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_layers=2,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=INNER,
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
        return (2 * torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    def norm() -> RMSNorm:
        return RMSNorm(1 + 0.1 * torch.randn(HIDDEN, generator=generator), 1e-5, dtype)

    layers = [
        Layer(
            attention_norm=norm(),
            qkv=Linear(random((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)),
            output=Linear(random(HIDDEN, HEADS * HEAD_DIM)),
            mlp_norm=norm(),
            gate_up=Linear(random(2 * INNER, HIDDEN), random(2 * INNER)),
            down=Linear(random(HIDDEN, INNER)),
            window=config.windows[index],
        )
        for index in range(2)
    ]
    rope = build_rope(config.rope, HEAD_DIM, config.max_position, torch.device("cpu"))
    return DecoderModel(config, random(VOCAB, HIDDEN), layers, norm(), Linear(random(VOCAB, HIDDEN)), rope)
