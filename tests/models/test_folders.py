"""Hugging Face folders: shards, dtypes, older configs, what is ignored, names and ids."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import YARN, build, edit_json, save_folder
from tiny_tokenizers import EOS

from tokenstep.models import LoadedModel, load
from tokenstep.models.packed_linear import embed


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(build("llama-biases"), tmp_path_factory.mktemp("folder") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "tiny")


def weights(loaded: LoadedModel) -> list[torch.Tensor]:
    model = loaded.model
    matrices = [model.embedding, model.head.weight, model.final_norm.weight]
    for layer in model.layers:
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
            matrices += [linear.weight] + ([] if linear.bias is None else [linear.bias])
        matrices += [layer.attention_norm.weight, layer.mlp_norm.weight]
    return matrices


def assert_same_weights(first: LoadedModel, second: LoadedModel) -> None:
    for one, other in zip(weights(first), weights(second), strict=True):
        assert torch.equal(one, other)


def test_shards_with_an_index_are_one_model(folder: Path, tmp_path: Path) -> None:
    sharded = save_folder(build("llama-biases"), tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3

    assert_same_weights(load(sharded, dtype="float32"), load(folder, dtype="float32"))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_are_converted_once(folder: Path, stored: torch.dtype, dtype: str) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.to(stored) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})

    model = load(folder, dtype=dtype).model

    assert model.dtype == getattr(torch, dtype)
    expected = tensors["model.embed_tokens.weight"].to(model.dtype)
    assert torch.equal(embed(torch.arange(len(expected)), model.embedding), expected)
    assert torch.equal(
        model.layers[2].down.weight, tensors["model.layers.2.mlp.down_proj.weight"].to(model.dtype)
    )
    # a norm keeps float32 unless the model's dtype has its values too
    norm = tensors["model.layers.1.input_layernorm.weight"].float()
    assert torch.equal(model.layers[1].attention_norm.weight.float(), norm)


def test_the_fields_of_older_configs_are_read(folder: Path) -> None:
    edit_json(folder / "config.json", rope_parameters=YARN)
    newer = load(folder).config
    older = {"type": "yarn", **{name: YARN[name] for name in ("factor", "beta_fast")}}
    older["original_max_position_embeddings"] = 32
    edit_json(folder / "config.json", rope_parameters=..., rope_theta=YARN["rope_theta"], rope_scaling=older)

    assert load(folder).config == newer


def test_yarn_stretches_the_context(folder: Path) -> None:
    edit_json(folder / "config.json", rope_parameters=YARN, max_position_embeddings=32)
    loaded = load(folder)

    assert loaded.config.max_position == 128
    assert loaded.model.rope.cos.shape[0] == 128


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_key_value_heads", 4), ("head_dim", 16), ("hidden_act", "silu"), ("mlp_bias", False)],
)
def test_an_absent_or_null_field_has_its_default(tmp_path: Path, field: str, value: object) -> None:
    folder = save_folder(build("llama-mha"), tmp_path / "tiny")
    edit_json(folder / "config.json", **{field: value})
    whole = load(folder).config
    for absent in (..., None):
        edit_json(folder / "config.json", **{field: absent})
        assert load(folder).config == whole


@pytest.mark.parametrize("name", ["qwen2-window", "gemma2"])
def test_windows_of_configs_without_layer_types_are_those_of_the_family(tmp_path: Path, name: str) -> None:
    folder = save_folder(build(name), tmp_path / "tiny")
    windows = load(folder).config.windows
    assert set(windows) == {7, None}
    edit_json(folder / "config.json", layer_types=...)
    assert load(folder).config.windows == windows


def test_what_a_tied_or_older_checkpoint_has_too_much_is_ignored(tmp_path: Path) -> None:
    folder = save_folder(build("llama-tied"), tmp_path / "tied")
    plain = load(folder, dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(1, 3)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    loaded = load(folder, dtype="float32")

    assert_same_weights(loaded, plain)
    assert loaded.model.head.weight is loaded.model.embedding


def test_end_tokens_are_those_of_config_and_generation_config(folder: Path) -> None:
    edit_json(folder / "config.json", eos_token_id=[5, EOS])
    edit_json(folder / "generation_config.json", eos_token_id=[EOS, 7, 100000])

    assert load(folder).config.eos_token_ids == (5, EOS, 7)
    assert load(folder).tokenizer.eos_token_ids == (5, EOS, 7)


def test_the_id_of_the_weights_follows_the_weights(folder: Path, saved: Path) -> None:
    first = load(folder)
    assert load(saved).weights_id == first.weights_id
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "model.safetensors").write_bytes(data)

    assert load(folder).weights_id != first.weights_id
    assert first.name == "tiny"
