"""Rope tables against transformers, up to the last position of long contexts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import LINEAR, LLAMA3, SIZES, YARN
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tokenstep.models.base_config import gguf_rope, hf_rope
from tokenstep.models.fields import Fields
from tokenstep.models.rope import build_rope

POSITIONS = 131072
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": LINEAR,
    "llama3": LLAMA3 | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192},
    "yarn": YARN | {"rope_theta": 1e6, "original_max_position_embeddings": 32768},
    "yarn, attention factor given": YARN | {"attention_factor": 1.3},
    "yarn, mscale": YARN | {"mscale": 1.5, "mscale_all_dim": 0.8},
    "yarn, not truncated": YARN | {"truncate": False},
    "yarn, all dimensions in the ramp": YARN | {"beta_fast": 1.0, "beta_slow": 1.0},
    "yarn, ramp from before the first dimension": YARN | {"beta_fast": 32.0},
    "yarn, ramp to behind the last dimension": YARN | {"rope_theta": 10.0, "beta_slow": 1e-4},
    "yarn, factor from the context": YARN | {"factor": None},
}


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_those_of_transformers(kind: str, head_dim: int) -> None:
    parameters = {name: value for name, value in KINDS[kind].items() if value is not None}
    config = {**SIZES, "head_dim": head_dim, "max_position_embeddings": POSITIONS}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**config, rope_parameters={**KINDS[kind]}))
    positions = torch.cat([torch.arange(300), torch.arange(POSITIONS - 300, POSITIONS)])
    cos, sin = theirs(torch.zeros(1), positions[None])

    ours = build_rope(hf_rope(Fields({"rope_parameters": parameters}, ""), POSITIONS), head_dim, POSITIONS)

    assert ours.cos.shape == ours.sin.shape == (POSITIONS, head_dim // 2)
    # bits: a frequency that differs in its last one turns the angle at the last position by 0.01
    assert torch.equal(ours.cos[positions], cos[0, :, : head_dim // 2])
    assert torch.equal(ours.sin[positions], sin[0, :, : head_dim // 2])


def test_older_configs_say_the_same_in_other_fields() -> None:
    def rope(**fields: Any) -> Any:
        return hf_rope(Fields(fields, ""), 256)

    assert rope() == rope(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert rope(rope_theta=500, rope_scaling=None) == rope(rope_parameters={"rope_theta": 500})
    scaling = {name: value for name, value in YARN.items() if name != "rope_theta"}
    older = {"type": "yarn", **{name: value for name, value in scaling.items() if name != "rope_type"}}
    assert rope(rope_theta=500.0, rope_scaling=older) == rope(rope_parameters=YARN)
    assert rope(rope_theta=500.0, rope_scaling=scaling) == rope(rope_parameters=YARN)
    outside = {name: value for name, value in YARN.items() if name != "original_max_position_embeddings"}
    assert rope(rope_parameters=outside, original_max_position_embeddings=32) == rope(rope_parameters=YARN)


def test_gguf_files_may_scale_the_attention_factor_of_yarn() -> None:
    def factor(**keys: float) -> float:
        scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 32, **keys}
        values = {f"llama.rope.scaling.{name}": value for name, value in scaling.items()}
        return gguf_rope(Fields(values, "", prefix="llama"), 256, 16, ()).attention_factor

    implied = 0.1 * math.log(4.0) + 1.0
    assert factor() == implied
    assert factor(attn_factor=1.5) == 1.5 * implied
    assert factor(yarn_attn_factor=1.5) == 1.5
    assert factor(yarn_attn_factor=1.5, attn_factor=2.0) == 3.0


def test_gguf_files_may_leave_out_the_kind_of_scaling() -> None:
    def rope(**values: Any) -> Any:
        keys = {f"llama.rope.{name.replace('__', '.')}": value for name, value in values.items()}
        return gguf_rope(Fields(keys, "", prefix="llama"), 256, 16, ())

    linear = rope(scaling__type="linear", scaling__factor=4.0)
    assert (linear.kind, linear.factor) == ("linear", 4.0)
    assert rope(scaling__factor=4.0) == rope(scale_linear=4.0) == linear
    assert rope(scaling__type="none", scaling__factor=4.0) == rope(scale_linear=1.0) == rope()
    assert rope().kind == "default"
