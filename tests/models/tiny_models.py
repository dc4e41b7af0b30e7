"""Tiny random models of every family, as transformers builds them, and written as folders and GGUF files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, RopeScalingType, get_tensor_name_map, quants
from tiny_tokenizers import EOS, VOCAB_SIZE, add_byte_level_metadata, byte_level_tokenizer
from transformers import PreTrainedModel

EMBEDDING_ROWS = 288  # more than the tokenizer has ids, as in many checkpoints
assert VOCAB_SIZE < EMBEDDING_ROWS

SIZES: dict[str, Any] = {
    "vocab_size": EMBEDDING_ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "rms_norm_eps": 1e-5,
}
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 500.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
}


@dataclass(frozen=True)
class Case:
    """One configuration: transformers' config class without its suffix, and what differs from SIZES."""

    family: str
    changes: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "llama": Case("Llama"),
    "llama-tied": Case("Llama", {"tie_word_embeddings": True}),
    "llama-mha": Case("Llama", {"num_key_value_heads": 4}),
    "llama-mqa-head8": Case("Llama", {"num_key_value_heads": 1, "head_dim": 8}),
    "llama-biases": Case("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": Case("Llama", {"rope_parameters": LINEAR}),
    "llama-llama3": Case("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": Case("Llama", {"rope_parameters": YARN}),
    "llama-yarn-attention": Case("Llama", {"rope_parameters": {**YARN, "attention_factor": 1.5}}),
    "llama-yarn-mscale": Case(
        "Llama", {"rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.8, "truncate": False}}
    ),
    "smollm": Case("Llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48}),
    "mistral": Case("Mistral", {"sliding_window": None, "head_dim": 24}),
    "mistral-window": Case("Mistral", {"sliding_window": 7}),
    "qwen2": Case("Qwen2"),
    "qwen2-window": Case("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen2-yarn": Case("Qwen2", {"rope_parameters": YARN}),
    "qwen3": Case("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-biases": Case("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "gemma2": Case(
        "Gemma2",
        {
            "head_dim": 24,
            "sliding_window": 7,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma2-scalar": Case(
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": 7,
            "query_pre_attn_scalar": 100,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "attention_bias": True,
        },
    ),
    "gemma2-46-layers": Case(  # as the 27B size, which scales by hidden_size / num_heads
        "Gemma2",
        {
            "num_hidden_layers": 46,
            "head_dim": 24,
            "hidden_size": 32,
            "intermediate_size": 32,
            "sliding_window": 7,
            "query_pre_attn_scalar": 8,
        },
    ),
}


@cache
def build(name: str) -> PreTrainedModel:
    """The model of a case in float32, with weights that make every part of it matter."""
    case = CASES[name]
    config = getattr(transformers, case.family + "Config")(**{**SIZES, **case.changes})
    config._attn_implementation = "eager"
    model: PreTrainedModel = getattr(transformers, case.family + "ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(len(name) * 1000 + sum(name.encode()))

    def noise(parameter: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator) * scale

    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):
                start = 0.0 if case.family == "Gemma2" else 1.0
                if "post" in parameter_name and config.num_hidden_layers > 10:
                    start -= 0.8  # many layers that each turn the state around would amplify rounding
                parameter.copy_(start + noise(parameter, 0.2))
            elif parameter.dim() == 1:
                parameter.copy_(noise(parameter, 0.5))
            else:
                parameter.copy_(noise(parameter, 1.5 / math.sqrt(parameter.shape[1])))
    return model


def save_folder(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """Writes config, weights and a tokenizer as transformers does; `options` go to save_pretrained."""
    model.save_pretrained(folder, **options)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Sets fields of a JSON object; a field set to ... is removed."""
    contents = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in contents.items() if value is not ...}))


Encode = Callable[[str, np.ndarray], tuple[np.ndarray, GGMLQuantizationType | None]]


def as_float32(name: str, values: np.ndarray) -> tuple[np.ndarray, GGMLQuantizationType | None]:
    return values, None


def quantized(kind: GGMLQuantizationType) -> Encode:
    """Stores matrices as `kind`, the rest in float32."""

    def encode(name: str, values: np.ndarray) -> tuple[np.ndarray, GGMLQuantizationType | None]:
        if values.ndim == 1:
            return values, None
        return quants.quantize(values, kind), kind

    return encode


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    encode: Encode = as_float32,
    metadata: Callable[[GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Writes the model as llama.cpp's converter does: its names, metadata, order of rows and norms."""
    config = model.config
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if architecture == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    window = getattr(config, "sliding_window", None)
    if window:
        writer.add_sliding_window(window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _add_rope(writer, config.rope_parameters, head_dim)
    add_byte_level_metadata(writer)
    metadata(writer)
    _add_tensors(writer, model, architecture, encode)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_rope(writer: GGUFWriter, rope: Mapping[str, Any], head_dim: int) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        if "attention_factor" in rope:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
    elif rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, head_dim))


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """What each frequency is divided by: 1 for short waves, the factor for long ones, a blend between."""
    frequencies = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - kept) / rope["factor"] + kept)).astype(np.float32)


def _add_tensors(writer: GGUFWriter, model: PreTrainedModel, architecture: str, encode: Encode) -> None:
    config = model.config
    kind = next(kind for kind, name in _architectures().items() if name == architecture)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and ".self_attn.q_proj." in name:
            tensor = interleave(tensor, config.num_attention_heads)
        if architecture == "llama" and ".self_attn.k_proj." in name:
            tensor = interleave(tensor, config.num_key_value_heads)
        if architecture == "gemma2" and name.endswith("norm.weight"):
            tensor = tensor + 1
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        values, raw_kind = encode(gguf_name, tensor.numpy())
        writer.add_tensor(gguf_name, values, raw_dtype=raw_kind)


def _architectures() -> dict[MODEL_ARCH, str]:
    from gguf.constants import MODEL_ARCH_NAMES

    return MODEL_ARCH_NAMES


def interleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of each head from halves (0 … D/2, D/2 … D) to pairs (0, D/2, 1, D/2 + 1, …)."""
    halves = weight.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()
