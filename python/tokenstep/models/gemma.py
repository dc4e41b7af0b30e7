"""Gemma-2: norms behind attention and MLP too, scaled embeddings, soft caps, a window every other layer."""

from __future__ import annotations

from tokenstep.models.base_config import gguf_base, gguf_layers, hf_base, hf_layers, hf_windows
from tokenstep.models.config import ModelConfig
from tokenstep.models.family import Family, GgufModel
from tokenstep.models.fields import Fields

LAYERS_OF_27B = 46  # the one size whose scores are scaled by hidden_size / num_heads; GGUF files don't say it


def gemma2_hf(fields: Fields) -> ModelConfig:
    """Even layers slide where `layer_types` doesn't say otherwise."""
    fields.refuse("use_bidirectional_attention", "causal attention")
    hidden_size, num_layers = fields.integer("hidden_size"), hf_layers(fields)
    if fields.has("layer_types"):
        windows = hf_windows(fields, num_layers)
    else:
        windows = _alternate(fields.integer("sliding_window", 4096), num_layers)
    bias = fields.flag("attention_bias", False)
    return hf_base(
        fields,
        "gemma2",
        head_dim=256,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        windows=windows,
        qkv_bias=bias,
        o_bias=bias,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        attention_scale=fields.positive("query_pre_attn_scalar", 256) ** -0.5,
        post_norms=True,
        embedding_scale=hidden_size**0.5,
        attention_softcap=fields.positive("attn_logit_softcapping")
        if fields.has("attn_logit_softcapping")
        else None,
        final_softcap=fields.positive("final_logit_softcapping")
        if fields.has("final_logit_softcapping")
        else None,
    )


def gemma2_gguf(model: GgufModel) -> ModelConfig:
    """The soft caps and the window have keys; their absence means the values all Gemma-2 sizes have."""
    fields = model.fields
    hidden_size, num_layers = fields.integer(".embedding_length"), gguf_layers(fields)
    head_size = fields.integer(".attention.key_length")
    if num_layers == LAYERS_OF_27B:
        head_size = hidden_size // fields.integer(".attention.head_count")
    return gguf_base(
        fields,
        "gemma2",
        model.shapes,
        model.rope_factors,
        activation="gelu_tanh",
        windows=_alternate(fields.integer(".attention.sliding_window", 4096), num_layers),
        attention_scale=head_size**-0.5,
        post_norms=True,
        embedding_scale=hidden_size**0.5,
        attention_softcap=fields.positive(".attn_logit_softcapping", 50.0),
        final_softcap=fields.positive(".final_logit_softcapping", 30.0),
    )


def _alternate(window: int, num_layers: int) -> tuple[int | None, ...]:
    return tuple(window if layer % 2 == 0 else None for layer in range(num_layers))


GEMMA2 = Family("gemma2", hf_config=gemma2_hf, gguf_config=gemma2_gguf, hf_norm_offset=1.0)
