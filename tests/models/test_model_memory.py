"""Weights that don't fit, random ones, and the scales of a KV cache that come with a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, build, edit_json, quantized, save_folder, write_gguf

from tokenstep.engine import Engine, EngineConfig
from tokenstep.models import (
    LoadedModel,
    ModelFileError,
    NotEnoughMemory,
    UnsupportedConfig,
    free_memory,
    load,
)
from tokenstep.models.gguf_weights import GgufWeights
from tokenstep.models.hf_weights import HfWeights

LAYERS, KV_HEADS = SIZES["num_hidden_layers"], SIZES["num_key_value_heads"]
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
CACHE_ALONE = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": SCHEME}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(build("llama-biases"), tmp_path / "tiny")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    encode = quantized(GGMLQuantizationType.Q8_0)
    return write_gguf(build("llama"), tmp_path / "tiny.gguf", encode=encode)


def leave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, available: int, swap: int = 0) -> None:
    """The system has that many bytes available, rounded down to whole kilobytes."""
    text = f"MemAvailable: {available // 1024} kB\nSwapFree: {swap // 1024} kB\n"
    (tmp_path / "meminfo").write_text(text)
    monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free_memory, "CGROUP_ROOT", tmp_path / "none")


@pytest.mark.parametrize("kind", ["folder", "gguf", "dequantised"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_does_not_fit_is_refused_before_anything_is_read(
    kind: str, dtype: str, folder: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, weights = folder if kind == "folder" else gguf, "dequantised" if kind == "dequantised" else "auto"
    needed = load(path, dtype=dtype, weights=weights).model.num_bytes
    leave(monkeypatch, tmp_path, needed + 1024)
    load(path, dtype=dtype, weights=weights)
    leave(monkeypatch, tmp_path, needed - 2048, swap=4096)
    load(path, dtype=dtype, weights=weights)

    def fail(self: object, name: str, target: object = None) -> None:
        raise AssertionError(f"{name} is read")

    leave(monkeypatch, tmp_path, needed - 1024)
    for source in (HfWeights, GgufWeights):
        monkeypatch.setattr(source, "read_into", fail)
    monkeypatch.setattr(GgufWeights, "raw", fail)
    numbers = rf"weights take {needed / 1e6:.1f} MB, of which cpu has {needed / 1e6:.1f} MB free"
    with pytest.raises(NotEnoughMemory, match=numbers + ": expected a smaller model") as caught:
        load(path, dtype=dtype, weights=weights)
    assert ("dtype='bfloat16', which halves this" in str(caught.value)) == (dtype == "float32")
    assert ("weights='auto'" in str(caught.value)) == (kind == "dequantised")


def test_random_weights_need_a_config_and_a_tokenizer_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"neither model\.safetensors"):
        load(folder)
    first, again = (load(folder, dtype="float32", weights="random") for _ in range(2))
    assert first.weights_id == again.weights_id
    assert first.weights_id.startswith("random")
    layers = first.model.layers
    assert torch.equal(layers[1].qkv.weight, again.model.layers[1].qkv.weight)
    assert not torch.equal(layers[1].qkv.weight, layers[0].qkv.weight)
    q, _, gate, down = (layers[0].qkv.weight[:64], *layers[0].gate_up.weight.chunk(2), layers[0].down.weight)
    for matrix in (q, gate, down, first.model.embedding):
        assert matrix.std() == pytest.approx(matrix.shape[1] ** -0.5, rel=0.1)
    assert torch.equal(layers[0].attention_norm.weight, torch.ones(64))
    assert layers[0].down.bias is not None
    assert not layers[0].down.bias.any()


@pytest.mark.parametrize("name", ["folder", "gguf"])
def test_random_weights_have_finite_logits(name: str, folder: Path, gguf: Path) -> None:
    path = folder if name == "folder" else gguf
    loaded = load(path, dtype="float16", weights="random")
    engine = Engine(loaded.model, loaded.tokenizer.vocab_size, EngineConfig(kv_tokens=64))
    assert loaded.weights_id != load(path).weights_id
    logits = engine.runner.raw_logits(torch.randn(3, 64).half())
    assert abs(logits).max() < 100


def with_scales(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> LoadedModel:
    """The folder with further tensors and fields of config.json."""
    stored = load_file(folder / "model.safetensors") | tensors
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", **config)
    return load(folder, dtype="float32")


@pytest.mark.parametrize(
    ("k_name", "v_name"),
    [
        ("model.layers.{}.self_attn.k_scale", "model.layers.{}.self_attn.v_scale"),
        ("model.layers.{}.self_attn.k_proj.k_scale", "model.layers.{}.self_attn.v_proj.v_scale"),
    ],
)
@pytest.mark.parametrize("values", [1, KV_HEADS])
def test_a_checkpoints_scales_are_those_of_its_float8_cache(
    folder: Path, k_name: str, v_name: str, values: int
) -> None:
    tensors = {
        name.format(layer): torch.arange(1, values + 1).to(torch.bfloat16) * (layer + 1) * factor
        for layer in range(LAYERS)
        for name, factor in ((k_name, 0.125), (v_name, 0.25))
    }
    loaded = with_scales(folder, tensors, quantization_config=CACHE_ALONE)
    config = EngineConfig(kv_tokens=64, kv_cache_dtype="float8_e4m3")
    scales = Engine(loaded.model, loaded.tokenizer.vocab_size, config).runner.cache.scales
    assert scales is not None
    per_head = torch.arange(1, values + 1).expand(KV_HEADS)
    for found, factor in ((scales.k, 0.125), (scales.v, 0.25)):
        assert found.dtype == torch.float32
        assert torch.equal(found, torch.stack([per_head * (i + 1) * factor for i in range(LAYERS)]))
    plain = Engine(loaded.model, loaded.tokenizer.vocab_size, EngineConfig(kv_tokens=64))
    assert plain.runner.cache.scales is None


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("k", None, "layer 0 has no k_scale, others have one"),
        ("v", [0.0], r"self_attn\.v_scale = \[0\.0\], expected 1 or 2 finite numbers above 0"),
        ("v", [float("nan")], r"self_attn\.v_scale = \[nan\], expected"),
        ("k", [1.0, 1.0, 1.0], r"self_attn\.k_scale = \[1\.0, 1\.0, 1\.0\], expected"),
    ],
)
def test_scales_that_cannot_be_used_are_refused(
    folder: Path, name: str, values: list[float] | None, message: str
) -> None:
    tensors = {f"model.layers.{i}.self_attn.{k}_scale": torch.ones(1) for i in range(LAYERS) for k in "kv"}
    wrong = f"model.layers.0.self_attn.{name}_scale"
    if values is None:
        del tensors[wrong]
    else:
        tensors[wrong] = torch.tensor(values)
    with pytest.raises(ModelFileError, match=message):
        with_scales(folder, tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config_groups": {"group_0": {}}}, "quantization_config = .* expected it absent"),
        ({"quant_method": "fp8"}, "quantization_config = .* expected it absent"),
        ({"kv_cache_scheme": SCHEME | {"num_bits": 4}}, r"kv_cache_scheme\.num_bits = 4, expected 8"),
        ({"kv_cache_scheme": SCHEME | {"type": "int"}}, r"kv_cache_scheme\.type = 'int', expected 'float'"),
        ({"kv_cache_scheme": SCHEME | {"dynamic": True}}, r"\.dynamic = True, expected False"),
    ],
)
def test_other_quantisation_is_refused_by_name(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        with_scales(folder, {}, quantization_config=CACHE_ALONE | changes)
