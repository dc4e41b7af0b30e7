"""What a GGUF file's metadata may not ask for and what doesn't fit: the error names the key and its value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from tiny_models import build, write_gguf

from tokenstep.models import ModelFileError, UnsupportedConfig, load

NAN, INFINITY = float("nan"), float("inf")
UNSUPPORTED: list[tuple[str, str, Any, str]] = [
    ("general.architecture", "add_string", "mamba", r"= 'mamba', expected one of 'llama', 'qwen2', 'qwen3'"),
    ("split.count", "add_uint16", 4, r"= 4, expected 1 \(llama-gguf-split --merge"),
    ("llama.expert_count", "add_uint32", 8, r"= 8, expected it absent \(a model without experts"),
    ("llama.attention.causal", "add_bool", False, r"= False, expected true"),
    ("llama.attention.scale", "add_float32", 0.5, r"= 0\.5, expected it absent"),
    ("llama.logit_scale", "add_float32", 0.5, r"= 0\.5, expected it absent"),
    ("llama.residual_scale", "add_float32", 0.5, r"= 0\.5, expected it absent"),
    ("llama.embedding_scale", "add_array", [0.5, 2.0], r"= array\(\[0\.5, 2\. \].*, expected it absent"),
    ("llama.attention.value_length", "add_uint32", 8, r"= 8, expected the head size, 16"),
    ("llama.rope.dimension_count", "add_uint32", 8, r"= 8, expected the head size, 16"),
    ("llama.rope.scaling.type", "add_string", "longrope", r"= 'longrope', expected one of 'none', 'linear'"),
    ("tokenizer.ggml.model", "add_string", "bert", r"= 'bert', expected one of 'gpt2', 'llama'"),
    ("tokenizer.ggml.pre", "add_string", "kimi-k2", r"= 'kimi-k2', expected one of 'gpt-2', "),
]
WRONG: list[tuple[str, str, Any, str]] = [
    ("general.architecture", "", None, r"is missing"),
    ("general.architecture", "add_uint32", 3, r"= 3, expected a string"),
    ("llama.rope.freq_base", "add_float32", 0.5, r"= 0\.5, expected a number > 1"),
    (
        "llama.attention.head_count",
        "add_array",
        [4, 4, 2],
        r"= array\(\[4, 4, 2\].*, expected an integer ≥ 1",
    ),
    ("llama.attention.head_count", "", None, r"is missing"),
    ("llama.block_count", "add_uint32", 2**31, r"= 2147483648, expected an integer ≥ 1 and ≤ 1024"),
    ("llama.context_length", "add_uint32", 2**31, r"= 2147483648, expected an integer ≥ 1 and ≤ 4194304"),
    ("llama.embedding_length", "add_uint64", 2**63, r"= 9223372036854775808, expected an integer"),
    ("llama.attention.layer_norm_rms_epsilon", "add_float32", INFINITY, r"= inf, expected a number ≥ 0"),
    ("tokenizer.ggml.tokens", "", None, r"is missing"),
    ("tokenizer.ggml.tokens", "add_array", [1, 2], r"= array\(\[1, 2\].*, expected a list of strings"),
    ("tokenizer.ggml.token_type", "add_array", [1] * 279, r"has 279 entries, expected 280"),
    ("tokenizer.ggml.token_type", "add_string", "x", r"= 'x', expected an array of numbers"),
    ("tokenizer.ggml.scores", "add_array", [NAN] * 280, r"= array.*, expected an array of numbers"),
    ("tokenizer.ggml.merges", "", None, r"is missing"),
    ("tokenizer.ggml.merges", "add_array", ["t h", "th"], r": .*out of vocabulary"),
    ("tokenizer.ggml.merges", "add_array", ["t zz"], r": .*`zz` out of vocabulary"),
    ("tokenizer.ggml.add_bos_token", "add_uint8", 1, r"= 1, expected true or false"),
    ("tokenizer.ggml.eos_token_id", "add_string", "x", r"= 'x', expected a token id"),
]


def with_key(path: Path, key: str, method: str, value: Any) -> Path:
    """A tiny Llama's file with one key of the metadata set, or removed if the value is None."""

    def edit(writer: GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        if value is not None:
            getattr(writer, method)(key, value)

    return write_gguf(build("llama"), path, metadata=edit)


@pytest.mark.parametrize(
    ("kind", "key", "method", "value", "message"),
    [(UnsupportedConfig, *case) for case in UNSUPPORTED] + [(ModelFileError, *case) for case in WRONG],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_the_key_and_its_value_are_named(
    tmp_path: Path, kind: type[Exception], key: str, method: str, value: Any, message: str
) -> None:
    path = with_key(tmp_path / "tiny.gguf", key, method, value)
    with pytest.raises(kind, match=rf"^tokenstep\.load: tiny\.gguf: {key} ?{message}"):
        load(path)


def test_a_split_model_of_one_part_is_whole(tmp_path: Path) -> None:
    assert load(with_key(tmp_path / "tiny.gguf", "split.count", "add_uint16", 1)).config.num_layers == 3


def test_a_token_may_not_be_twice_in_the_vocabulary(tmp_path: Path) -> None:
    def edit(writer: GGUFWriter) -> None:
        tokens = writer.kv_data[0].pop("tokenizer.ggml.tokens").value
        writer.add_array("tokenizer.ggml.tokens", [*tokens[:-1], tokens[5]])

    path = write_gguf(build("llama"), tmp_path / "tiny.gguf", metadata=edit)
    with pytest.raises(ModelFileError, match=r"tokenizer\.ggml\.tokens has '.' twice"):
        load(path)


def test_a_sentencepiece_vocabulary_without_scores_is_refused(tmp_path: Path) -> None:
    path = with_key(tmp_path / "tiny.gguf", "tokenizer.ggml.model", "add_string", "llama")
    with pytest.raises(ModelFileError, match=r"tokenizer\.ggml\.scores is missing"):
        load(path)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([1.0] * 4, "has 4 values, expected 8"),
        ([1.0] * 7 + [0.0], "has 8 values, expected 8, all > 0"),
        ([1.0] * 7 + [NAN], "has 8 values, expected 8, all > 0"),
    ],
)
def test_frequency_factors_of_the_wrong_number_or_sign_are_refused(
    tmp_path: Path, factors: list[float], message: str
) -> None:
    def edit(writer: GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))

    path = write_gguf(build("llama"), tmp_path / "tiny.gguf", metadata=edit)
    with pytest.raises(ModelFileError, match=rf"rope_freqs\.weight {message}"):
        load(path)


def test_frequency_factors_beside_another_scaling_are_refused(tmp_path: Path) -> None:
    def edit(writer: GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", 2.0)
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))

    path = write_gguf(build("llama"), tmp_path / "tiny.gguf", metadata=edit)
    with pytest.raises(UnsupportedConfig, match=r"rope\.scaling\.type = 'linear', expected 'none' in a file"):
        load(path)
