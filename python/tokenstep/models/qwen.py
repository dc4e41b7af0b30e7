"""Qwen2 and Qwen2.5 (a bias on q, k and v), Qwen3 (a norm on each head of q and k instead)."""

from __future__ import annotations

from tokenstep.models.base_config import gguf_base, hf_base, hf_layers, hf_windows
from tokenstep.models.config import ModelConfig
from tokenstep.models.family import Family, GgufModel
from tokenstep.models.fields import Fields


def qwen2_hf(fields: Fields) -> ModelConfig:
    """Qwen2.5 names itself qwen2 too."""
    return hf_base(fields, "qwen2", windows=_windows(fields), qkv_bias=True)


def qwen3_hf(fields: Fields) -> ModelConfig:
    """head_dim doesn't follow from hidden_size; 128 where the file doesn't say."""
    bias = fields.flag("attention_bias", False)
    return hf_base(
        fields, "qwen3", head_dim=128, windows=_windows(fields), qkv_bias=bias, o_bias=bias, qk_norm=True
    )


def qwen2_gguf(model: GgufModel) -> ModelConfig:
    """As the common reading; the biases are seen from the tensors."""
    return gguf_base(model.fields, "qwen2", model.shapes, model.rope_factors)


def qwen3_gguf(model: GgufModel) -> ModelConfig:
    """As the common reading, with norms on q and k."""
    return gguf_base(model.fields, "qwen3", model.shapes, model.rope_factors, qk_norm=True)


def _windows(fields: Fields) -> tuple[int | None, ...]:
    """Where sliding windows are switched on, the layers from `max_window_layers` on have them."""
    num_layers = hf_layers(fields)
    if not fields.flag("use_sliding_window", False) or not fields.has("sliding_window"):
        return (None,) * num_layers
    if fields.has("layer_types"):
        return hf_windows(fields, num_layers)
    window, first = fields.integer("sliding_window"), fields.integer("max_window_layers", 28, minimum=0)
    return tuple(window if layer >= first else None for layer in range(num_layers))


QWEN2 = Family("qwen2", hf_config=qwen2_hf, gguf_config=qwen2_gguf)
QWEN3 = Family("qwen3", hf_config=qwen3_hf, gguf_config=qwen3_gguf)
