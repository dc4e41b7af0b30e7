"""Damaged, cut and fuzzed folders: a clear error, no other exception, no memory for what isn't there."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from damage import FUZZ, LARGE, Edit, damaged, edits, load_or_refuse
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import build, edit_json, save_folder

from tokenstep.models import ModelFileError, UnsupportedConfig, load


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder") / "tiny"
    return save_folder(build("llama"), folder, max_shard_size="60KB")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "tiny")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_an_index_to_a_missing_shard_is_refused(folder: Path) -> None:
    shards(folder)[1].unlink()
    with pytest.raises(ModelFileError, match=r"index\.json: names model-00002-of-.*, which the folder lacks"):
        load(folder)


@pytest.mark.parametrize("contents", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none_is_refused(folder: Path, contents: str) -> None:
    (folder / "model.safetensors.index.json").write_text(contents)
    with pytest.raises(ModelFileError, match=r"index\.json: expected an object with weight_map"):
        load(folder)


def test_an_index_may_not_lead_out_of_the_folder(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../tiny/" + shards(folder)[0].name}}))
    with pytest.raises(ModelFileError, match=r"from tensors to files beside it"):
        load(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelFileError, match=r"has neither model\.safetensors nor model\.safetensors\.index"):
        load(folder)


def test_shards_that_lack_a_tensor_are_refused(folder: Path) -> None:
    for shard in shards(folder):
        tensors = load_file(shard)
        if tensors.pop("model.layers.1.mlp.up_proj.weight", None) is not None:
            save_file(tensors, shard)
    with pytest.raises(
        ModelFileError, match=r"tiny: the tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"
    ):
        load(folder)


def test_weights_in_integers_are_refused(folder: Path) -> None:
    for shard in shards(folder):
        tensors = load_file(shard)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
            save_file(tensors, shard)
    with pytest.raises(
        UnsupportedConfig, match=r"model\.norm\.weight has dtype I8, expected one of 'F32', 'F16'"
    ):
        load(folder)


@pytest.mark.parametrize("share", [0.0, 0.00005, 0.001, 0.01, 0.5, 0.999])
def test_a_cut_shard_is_named(folder: Path, share: float) -> None:
    shard = shards(folder)[0]
    contents = shard.read_bytes()
    shard.write_bytes(contents[: int(share * len(contents))])
    with pytest.raises(ModelFileError, match=rf"{shard.name}: .*\(is the file complete\?\)"):
        load(folder)


@pytest.mark.parametrize("length", LARGE)
def test_a_shard_whose_header_is_longer_than_the_file_is_refused(folder: Path, length: int) -> None:
    shard = shards(folder)[0]
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])
    with pytest.raises(ModelFileError, match=shard.name):
        load(folder)


@settings(max_examples=80, **FUZZ)
@given(changes=st.lists(edits(), min_size=1, max_size=3))
def test_any_damage_to_a_shard_s_header_is_loaded_or_refused(folder: Path, changes: list[Edit]) -> None:
    shard = shards(folder)[0]
    contents = shard.read_bytes()
    length = 8 + struct.unpack("<Q", contents[:8])[0]
    shard.write_bytes(damaged(contents, changes, length))
    load_or_refuse(folder)
    shard.write_bytes(contents)


def test_a_config_without_weights_of_its_size_takes_no_memory(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=2**31 - 1, hidden_size=2**20, head_dim=16)
    tracemalloc.start()
    with pytest.raises(ModelFileError, match=r"has shape \[288, 64\], expected \[2147483647, 1048576\]"):
        load(folder)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
