"""What all families read alike from `config.json` or GGUF metadata; a family file changes what differs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tokenstep.models.config import ModelConfig, RopeConfig
from tokenstep.models.errors import ModelFileError
from tokenstep.models.fields import Fields, one_of
from tokenstep.models.rope import yarn_attention_factor

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
GGUF_ROPE_KINDS = ("none", "linear", "yarn")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
GGUF_REFUSED = {
    ".expert_count": "a model without experts",
    ".attention.scale": "scores scaled by the head size",
    ".logit_scale": "logits as the head gives them",
    ".residual_scale": "plain residuals",
    ".embedding_scale": "plain embeddings",
}
# Far above any model: more comes from a damaged file, and would take memory before that shows.
MAX_LAYERS = 1024
MAX_POSITION = 1 << 22


def hf_base(
    fields: Fields,
    family: str,
    *,
    head_dim: int | None = None,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    **changes: Any,
) -> ModelConfig:
    """A llama-like ModelConfig from the fields of a Hugging Face `config.json`.

    Args:
        fields: the contents of config.json.
        family: the family's name.
        head_dim: what an absent head_dim stands for; None: hidden_size / num_attention_heads.
        activation: the field that names the activation, and what its absence means.
        changes: fields of ModelConfig to set instead of the common reading.
    """
    _refuse_quantised_weights(fields)
    for architecture in fields.strings("architectures") if fields.has("architectures") else ():
        if not architecture.endswith("ForCausalLM"):
            raise fields.unsupported("architectures", "a model with a language modelling head, …ForCausalLM")
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_layers = hf_layers(fields)
    max_position = fields.integer("max_position_embeddings", maximum=MAX_POSITION)
    head_dim = fields.integer("head_dim", head_dim or _even_share(fields, hidden_size, num_heads))
    name = fields.choice(activation[0], tuple(ACTIVATIONS), activation[1])
    rope = hf_rope(fields, max_position)
    values: dict[str, Any] = {
        "family": family,
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": fields.integer("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "intermediate_size": fields.integer("intermediate_size"),
        "max_position": _stretched(max_position, rope),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "rope": rope,
        "attention_scale": head_dim**-0.5,
        "windows": (None,) * num_layers,
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "eos_token_ids": fields.token_ids("eos_token_id"),
        "bos_token_id": next(iter(fields.token_ids("bos_token_id")), None),
        "activation": ACTIVATIONS[name],
    }
    return ModelConfig(**(values | changes)).check(fields.source)


def _refuse_quantised_weights(fields: Fields) -> None:
    """`quantization_config` may have no more than a float8_e4m3 KV cache, as llm-compressor writes it."""
    config = fields.nested("quantization_config")
    if config.get("quant_method") != "compressed-tensors" or config.get("config_groups"):
        fields.refuse("quantization_config", "weights in float32, float16 or bfloat16")
    if config.has("kv_cache_scheme"):
        scheme = config.nested("kv_cache_scheme")
        for name, wanted in (("type", "float"), ("num_bits", 8), ("symmetric", True), ("dynamic", False)):
            if scheme.get(name, wanted) != wanted:
                raise scheme.unsupported(name, repr(wanted))


def hf_layers(fields: Fields) -> int:
    """The number of layers."""
    return fields.integer("num_hidden_layers", maximum=MAX_LAYERS)


def hf_windows(fields: Fields, num_layers: int, window: int | None = None) -> tuple[int | None, ...]:
    """The window of each layer from `layer_types`; without that list, `window` in every layer."""
    kinds = fields.get("layer_types")
    if kinds is None:
        return (window,) * num_layers
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.wrong("layer_types", f"a list of {num_layers} names, one a layer")
    allowed = ("full_attention", "sliding_attention")
    if any(kind not in allowed for kind in kinds):
        raise fields.unsupported("layer_types", "each " + one_of(allowed))
    if "sliding_attention" not in kinds:
        return (None,) * num_layers
    window = fields.integer("sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def hf_rope(fields: Fields, max_position: int) -> RopeConfig:
    """RopeConfig from `rope_parameters`, or from the older `rope_scaling` and `rope_theta`."""
    scaling = fields.nested("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")
    for name, value in scaling.values.items():
        if isinstance(value, Mapping):
            raise scaling.unsupported(name, "the same rotation in all layers")
    theta = _theta(scaling if scaling.has("rope_theta") else fields, "rope_theta")
    if scaling.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise (scaling if scaling.has("partial_rotary_factor") else fields).unsupported(
            "partial_rotary_factor", "1 (the whole head is rotated)"
        )
    kind = scaling.choice("rope_type" if scaling.has("rope_type") else "type", ROPE_KINDS, "default")
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", scaling.positive("factor"))
    # a field of its own, as some checkpoints have it, goes before the one among the rope parameters
    original = scaling.integer("original_max_position_embeddings", max_position)
    original = fields.integer("original_max_position_embeddings", original)
    if kind == "llama3":
        low, high = scaling.positive("low_freq_factor"), scaling.positive("high_freq_factor")
        if high <= low:
            raise scaling.wrong("high_freq_factor", f"more than low_freq_factor, {low:g}")
        return RopeConfig(
            theta,
            "llama3",
            scaling.positive("factor"),
            original_max_position=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    factor = scaling.positive("factor", max_position / original)
    mscale, mscale_all = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    inferred = yarn_attention_factor(factor)
    if mscale and mscale_all:
        inferred = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, mscale_all)
    return RopeConfig(
        theta,
        "yarn",
        factor,
        scaling.positive("attention_factor", inferred),
        original,
        beta_fast=scaling.positive("beta_fast", 32.0),
        beta_slow=scaling.positive("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
    )


def gguf_base(
    fields: Fields,
    family: str,
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: tuple[float, ...],
    **changes: Any,
) -> ModelConfig:
    """A llama-like ModelConfig from a GGUF file.

    Args:
        fields: the file's metadata; names that start with a dot are the architecture's.
        family: the family's name.
        shapes: the shape of each tensor in the file.
        rope_factors: the values of `rope_freqs.weight`; () where the file has none.
        changes: fields of ModelConfig to set instead of the common reading.
    """
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise ModelFileError(
            f"tokenstep.load: {fields.source}: the tensor token_embd.weight is missing or no matrix"
        )
    for name, why in GGUF_REFUSED.items():
        fields.refuse(name, why)
    if fields.integer("split.count", 1, minimum=0) > 1:
        raise fields.unsupported("split.count", "1 (llama-gguf-split --merge makes one file of all)")
    if not fields.flag(".attention.causal", True):
        raise fields.unsupported(".attention.causal", "true")
    hidden_size = fields.integer(".embedding_length")
    num_heads = fields.integer(".attention.head_count")
    num_layers = gguf_layers(fields)
    head_dim = fields.integer(".attention.key_length", _even_share(fields, hidden_size, num_heads))
    for name in (".attention.value_length", ".rope.dimension_count"):
        if fields.integer(name, head_dim) != head_dim:
            raise fields.unsupported(name, f"the head size, {head_dim}")
    window = fields.integer(".attention.sliding_window", 0, minimum=0) or None
    max_position = fields.integer(".context_length", maximum=MAX_POSITION)
    rope = gguf_rope(fields, max_position, head_dim, rope_factors)
    values: dict[str, Any] = {
        "family": family,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": fields.integer(".attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "intermediate_size": fields.integer(".feed_forward_length"),
        "max_position": _stretched(max_position, rope),
        "rms_norm_eps": fields.number(".attention.layer_norm_rms_epsilon"),
        "rope": rope,
        "attention_scale": head_dim**-0.5,
        "windows": (window,) * num_layers,
        "tie_embeddings": "output.weight" not in shapes,
        "eos_token_ids": tuple(
            dict.fromkeys(
                i
                for kind in ("eos", "eot", "eom")
                for i in fields.token_ids(f"tokenizer.ggml.{kind}_token_id")
            )
        ),
        "bos_token_id": next(iter(fields.token_ids("tokenizer.ggml.bos_token_id")), None),
        "qkv_bias": "blk.0.attn_q.bias" in shapes,
        "o_bias": "blk.0.attn_output.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    }
    return ModelConfig(**(values | changes)).check(fields.source)


def gguf_layers(fields: Fields) -> int:
    """The number of layers."""
    return fields.integer(".block_count", maximum=MAX_LAYERS)


def gguf_rope(
    fields: Fields, max_position: int, head_dim: int, rope_factors: tuple[float, ...]
) -> RopeConfig:
    """RopeConfig from `<architecture>.rope.*` and the frequency factors of `rope_freqs.weight`."""
    theta = _theta(fields, ".rope.freq_base")
    kind = fields.choice(".rope.scaling.type", GGUF_ROPE_KINDS, "linear")
    factor = fields.number(".rope.scaling.factor", fields.number(".rope.scale_linear", 0.0)) or 1.0
    scaled = kind == "yarn" or (kind == "linear" and factor != 1.0)
    if rope_factors:
        if scaled:
            raise fields.unsupported(".rope.scaling.type", "'none' in a file that has rope_freqs.weight")
        if len(rope_factors) != head_dim // 2 or not all(value > 0 for value in rope_factors):
            raise ModelFileError(
                f"tokenstep.load: {fields.source}: rope_freqs.weight has {len(rope_factors)} values, expected"
                f" {head_dim // 2}, all > 0"
            )
        return RopeConfig(theta, "factors", frequency_factors=rope_factors)
    if not scaled:
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", factor)
    fields.refuse(".rope.scaling.yarn_log_multiplier", "YaRN with its own temperature")
    # the first is config.json's attention_factor, the second multiplies whatever it is
    attention_factor = fields.positive(".rope.scaling.yarn_attn_factor", yarn_attention_factor(factor))
    attention_factor *= fields.positive(".rope.scaling.attn_factor", 1.0)
    if not math.isclose(fields.number(".rope.scaling.yarn_ext_factor", 1.0), 1.0):
        raise fields.unsupported(".rope.scaling.yarn_ext_factor", "1")
    return RopeConfig(
        theta,
        "yarn",
        factor,
        attention_factor,
        fields.integer(".rope.scaling.original_context_length", max_position),
        beta_fast=fields.positive(".rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.positive(".rope.scaling.yarn_beta_slow", 1.0),
    )


def _theta(fields: Fields, name: str) -> float:
    theta = fields.positive(name, 10000.0)
    if theta <= 1.0:
        raise fields.wrong(name, "a number > 1")
    return theta


def _stretched(max_position: int, rope: RopeConfig) -> int:
    """The context with YaRN, which checkpoints leave at what it was before."""
    if rope.kind != "yarn":
        return max_position
    return max(max_position, min(MAX_POSITION, round(rope.original_max_position * rope.factor)))


def _even_share(fields: Fields, hidden_size: int, num_heads: int) -> int | None:
    return hidden_size // num_heads if hidden_size % num_heads == 0 else None
