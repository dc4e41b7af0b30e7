"""What a config.json may not ask for and what doesn't fit: the error names the field and its value."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import YARN, build, edit_json, save_folder

from tokenstep.models import ModelFileError, ModelNotFound, UnsupportedConfig, load
from tokenstep.models.fields import LARGEST


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {**YARN, **changes}}


def rope_only(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": parameters}


SAME_BANDS = {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}
SIZES = {"vocab_size": LARGEST, "hidden_size": LARGEST, "head_dim": 16}

UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "mamba"}, r"model_type = 'mamba', expected one of 'llama', 'mistral', 'qwen2'"),
    ("llama", {"architectures": ["LlamaModel"]}, r"architectures = \['LlamaModel'\], expected a model with"),
    ("llama", {"hidden_act": "relu"}, r"hidden_act = 'relu', expected one of 'silu'"),
    (
        "llama",
        {"quantization_config": {"bits": 4}},
        r"quantization_config = \{'bits': 4\}, expected it absent",
    ),
    ("llama", {"head_dim": 12}, r"head_dim = 12, expected a multiple of 8 up to 256"),
    ("llama", {"head_dim": 264}, r"head_dim = 264, expected a multiple of 8 up to 256"),
    (
        "llama",
        rope_only(rope_type="dynamic", factor=2),
        r"rope_parameters\.rope_type = 'dynamic', expected one",
    ),
    (
        "llama",
        {"rope_parameters": ..., "rope_scaling": {"type": "su"}},
        r"rope_scaling\.type = 'su', expected",
    ),
    (
        "llama",
        rope_only(full_attention={"rope_theta": 5}),
        r"rope_parameters\.full_attention = .*in all layers",
    ),
    ("llama", rope(partial_rotary_factor=0.5), r"rope_parameters\.partial_rotary_factor = 0\.5, expected 1"),
    ("llama", {"partial_rotary_factor": 0.5}, r"json: partial_rotary_factor = 0\.5, expected 1"),
    ("gemma2", {"hidden_activation": "relu"}, r"hidden_activation = 'relu', expected one of"),
    (
        "gemma2",
        {"use_bidirectional_attention": True},
        r"use_bidirectional_attention = True, expected it absent",
    ),
    (
        "gemma2",
        {"layer_types": ["chunked_attention"] * 3},
        r"layer_types = \['chunked_attention', .*each one of",
    ),
]
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": ...}, r"model_type is missing"),
    ("llama", {"model_type": 3}, r"model_type = 3, expected a string"),
    (
        "llama",
        {"architectures": "LlamaForCausalLM"},
        r"architectures = 'Llama.*', expected a list of strings",
    ),
    ("llama", {"num_attention_heads": 3}, r"3 attention heads, expected a multiple of the 2 key-value heads"),
    ("llama", {"hidden_size": ...}, r"hidden_size is missing"),
    ("llama", {"hidden_size": 0}, r"hidden_size = 0, expected an integer ≥ 1"),
    ("llama", {"hidden_size": "64"}, r"hidden_size = '64', expected an integer"),
    ("llama", {"hidden_size": 2**40}, r"hidden_size = 1099511627776, expected an integer"),
    ("llama", {"num_hidden_layers": 10**6}, r"num_hidden_layers = 1000000, expected an integer .* ≤ 1024"),
    (
        "llama",
        {"max_position_embeddings": 10**9},
        r"max_position_embeddings = 1000000000, expected an integer",
    ),
    ("llama", {"rms_norm_eps": -1}, r"rms_norm_eps = -1, expected a number ≥ 0"),
    ("llama", {"rms_norm_eps": float("nan")}, r"rms_norm_eps = nan, expected a number ≥ 0"),
    ("llama", {"attention_bias": "no"}, r"attention_bias = 'no', expected true or false"),
    ("llama", {"eos_token_id": [1, "x"]}, r"eos_token_id = \[1, 'x'\], expected a token id or a list"),
    ("llama", {"rope_parameters": "yarn"}, r"rope_parameters = 'yarn', expected an object"),
    ("llama", rope(rope_theta=1), r"rope_parameters\.rope_theta = 1, expected a number > 1"),
    ("llama", rope(rope_theta="x"), r"rope_parameters\.rope_theta = 'x', expected a number"),
    ("llama", rope(factor=0), r"rope_parameters\.factor = 0, expected a number > 0"),
    ("llama", rope_only(rope_type="linear"), r"rope_parameters\.factor is missing"),
    ("llama", rope_only(**SAME_BANDS), r"high_freq_factor = 4, expected more than low_freq_factor, 4"),
    ("mistral", {"sliding_window": 0}, r"sliding_window = 0, expected an integer ≥ 1"),
    ("gemma2", {"layer_types": ["full_attention"]}, r"layer_types = \['full_att.*expected a list of 3 names"),
    ("gemma2", {"query_pre_attn_scalar": 0}, r"query_pre_attn_scalar = 0, expected a number > 0"),
    (
        "qwen2-window",
        {"layer_types": ..., "max_window_layers": -1},
        r"max_window_layers = -1, expected an int",
    ),
    ("llama", {"vocab_size": 100}, r"the tokenizer has 280 ids, the embedding only 100 rows"),
    ("llama", {"vocab_size": 289}, r"embed_tokens\.weight has shape \[288, 64\], expected \[289, 64\]"),
    ("llama", SIZES, r"embed_tokens\.weight has shape \[288, 64\], expected \[2147483647, 2147483647\]"),
    ("llama", {"intermediate_size": 95}, r"gate_proj\.weight has shape \[96, 64\], expected \[95, 64\]"),
    ("llama", {"num_key_value_heads": 1}, r"k_proj\.weight has shape \[32, 64\], expected \[16, 64\]"),
    ("llama", {"num_hidden_layers": 4}, r"the tensor model\.layers\.3\..* is missing"),
    ("llama", {"num_hidden_layers": 2}, r"9 tensors have no place in a llama model: model\.layers\.2\..*, …"),
    ("llama", {"mlp_bias": True}, r"the tensor model\.layers\.0\.mlp\.gate_proj\.bias is missing"),
    ("llama-biases", {"mlp_bias": False}, r"9 tensors have no place in a llama model: .*down_proj\.bias, "),
    ("llama-tied", {"tie_word_embeddings": False}, r"the tensor lm_head\.weight is missing"),
]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    parent = tmp_path_factory.mktemp("models")
    return lambda name: save_folder(build(name), parent / name)


@pytest.mark.parametrize(
    ("kind", "name", "changes", "message"),
    [(UnsupportedConfig, *case) for case in UNSUPPORTED] + [(ModelFileError, *case) for case in WRONG],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_the_field_and_its_value_are_named(
    save: Callable[[str], Path], kind: type[Exception], name: str, changes: dict[str, Any], message: str
) -> None:
    folder = save(name)
    edit_json(folder / "config.json", **changes)
    with pytest.raises(kind, match=r"^tokenstep\.load: .*" + message):
        load(folder)


def test_a_folder_without_what_a_model_needs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"model = '.*nothing', expected 'smollm2', a \.gguf file or a"):
        load(tmp_path / "nothing")
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        load(tmp_path)
    for contents, message in (("{", r"config\.json: Expecting"), ("[]", r"config\.json: expected an object")):
        (tmp_path / "config.json").write_text(contents)
        with pytest.raises(ModelFileError, match=message):
            load(tmp_path)
    save_folder(build("llama"), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": -5}))
    with pytest.raises(ModelFileError, match=r"generation_config\.json: eos_token_id = -5, expected a token"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", ["float64", "int8", 3])
def test_another_dtype_is_refused(save: Callable[[str], Path], dtype: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"dtype = {dtype!r}, expected one of 'auto', 'float32', 'bfloat16'"
    ):
        load(save("llama"), dtype=dtype)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31 - 1, 2**31, 2**70, 10**400, 1e-30, 1e30, float("nan"), float("inf")]),
    st.sampled_from(["", "x", "yarn", "silu", [], ["full_attention"] * 3, ["sliding_attention"] * 3, {}]),
    st.dictionaries(st.sampled_from([*YARN, "mscale", "mscale_all_dim"]), st.floats(), max_size=4),
)


@pytest.mark.parametrize("name", ["llama-yarn", "qwen2-window", "gemma2", "mistral-window"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_values_of_any_fields_are_loaded_or_refused(
    save: Callable[[str], Path], name: str, data: st.DataObject
) -> None:
    folder = save(name)
    fields = sorted(json.loads((folder / "config.json").read_text()))
    edit_json(
        folder / "config.json", **data.draw(st.dictionaries(st.sampled_from(fields), VALUES, max_size=3))
    )
    with contextlib.suppress(ModelFileError, UnsupportedConfig):
        load(folder)
