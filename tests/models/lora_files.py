"""Random adapters in PEFT's format, and the models that they make when they are merged."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG: dict[str, Any] = {  # what PEFT 0.21 writes for a plain adapter
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": list(ALL),
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_dropout": 0.1,
    "loftq_config": {},
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "task_type": "CAUSAL_LM",
    "qalora_group_size": 16,
    "megatron_core": "megatron.core",
    "peft_version": "0.21.2",
    "auto_mapping": None,
}


def targets(model: PreTrainedModel, names: Sequence[str] = ALL) -> dict[str, torch.nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in names
    }


def first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def random_adapter(model: PreTrainedModel, seed: int, **config: Any) -> dict[str, torch.Tensor]:
    """Tensors by the names that PEFT gives them, large enough to change every token."""
    config = {**CONFIG, **config}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in targets(model, config["target_modules"]).items():
        rank = first_match(config["rank_pattern"], name, config["r"])
        for matrix, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
            values = torch.randn(shape, generator=generator) / math.sqrt(shape[1])
            tensors[f"base_model.model.{name}.lora_{matrix}.weight"] = values
    return tensors


def write_adapter(
    folder: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: value for name, value in {**CONFIG, **config}.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(written))
    save_file({name: t.to(dtype) for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def merged(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], **config: Any) -> PreTrainedModel:
    """W + alpha / r · B A for each target, alpha / sqrt(r) with use_rslora."""
    config = {**CONFIG, **config}
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in targets(result, config["target_modules"]).items():
            rank = first_match(config["rank_pattern"], name, config["r"])
            alpha = first_match(config["alpha_pattern"], name, config["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
            a, b = (tensors[f"base_model.model.{name}.lora_{matrix}.weight"].double() for matrix in "AB")
            module.weight += scale * (b @ a).float()
    return result
