"""Llama and what shares its decoder: SmolLM, SmolLM2 (both named llama in their files) and Mistral."""

from __future__ import annotations

from tokenstep.models.base_config import gguf_base, hf_base, hf_layers, hf_windows
from tokenstep.models.config import ModelConfig
from tokenstep.models.family import Family, GgufModel
from tokenstep.models.fields import Fields


def llama_hf(fields: Fields) -> ModelConfig:
    """attention_bias gives q, k, v and o a bias, mlp_bias the three of the MLP."""
    bias = fields.flag("attention_bias", False)
    return hf_base(fields, "llama", qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias", False))


def mistral_hf(fields: Fields) -> ModelConfig:
    """One window for all layers; null or absent: full attention."""
    window = fields.integer("sliding_window") if fields.has("sliding_window") else None
    num_layers = hf_layers(fields)
    return hf_base(fields, "mistral", windows=hf_windows(fields, num_layers, window))


def llama_gguf(model: GgufModel) -> ModelConfig:
    """GGUF's "llama" is Llama, Mistral and SmolLM alike."""
    return gguf_base(model.fields, "llama", model.shapes, model.rope_factors)


LLAMA = Family("llama", hf_config=llama_hf, gguf_config=llama_gguf, gguf_interleaves_qk=True)
MISTRAL = Family("mistral", hf_config=mistral_hf, gguf_config=None)
