"""The weights of a Hugging Face folder, one safetensors file or several with an index, under our names."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenstep.models.config import ModelConfig
from tokenstep.models.errors import ModelFileError, UnsupportedConfig
from tokenstep.models.fields import one_of, shown
from tokenstep.models.kv_cache import KVScales

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# where there are norms on both sides, the name of the one before the MLP goes to the one behind the attention
POST_NORM_NAMES = LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
KV_SCALE = re.compile(r"model\.layers\.(\d+)\.self_attn\.(?:[kv]_proj\.)?([kv])_scale")
"""Of a float8_e4m3 cache: as llm-compressor and ModelOpt write them."""
IGNORED = ("rotary_emb.inv_freq",)  # buffers of old checkpoints
DTYPES = ("F32", "F16", "BF16", "F64")


class HfWeights:
    """A TensorSource over a folder.

    Args:
        folder: holds model.safetensors or the index and its files.
        post_norms: the family has norms behind attention and MLP, which changes names.
        tied: the head is the embedding; an lm_head in the file is ignored.
        norm_offset: is added to norm weights.
    """

    def __init__(self, folder: Path, *, post_norms: bool, tied: bool, norm_offset: float) -> None:
        self.source = folder.name
        self._layer_names = POST_NORM_NAMES if post_norms else LAYER_NAMES
        self._norm_offset = norm_offset
        self._files = [_open(path) for path in weight_files(folder)]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118
        ignored = {name for name in self._where if name.endswith(IGNORED)}
        scales = {name: match for name in self._where if (match := KV_SCALE.fullmatch(name))}
        self._kv_scales = {(int(match[1]), match[2]): name for name, match in scales.items()}
        self._unexpected = set(self._where) - ignored - set(scales) - ({NAMES["head"]} if tied else set())

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """See TensorSource."""
        file_name = self._file_name(name)
        file = self._where.get(file_name)
        if file is None:
            raise ModelFileError(f"tokenstep.load: {self.source}: the tensor {file_name} is missing")
        entry = file.get_slice(file_name)
        if tuple(entry.get_shape()) != shape:
            raise ModelFileError(
                f"tokenstep.load: {self.source}: {file_name} has shape {entry.get_shape()}, expected"
                f" {list(shape)}"
            )
        if entry.get_dtype() not in DTYPES:
            raise UnsupportedConfig(
                f"tokenstep.load: {self.source}: {file_name} has dtype {entry.get_dtype()}, expected"
                f" {one_of(DTYPES)}"
            )
        self._unexpected.discard(file_name)

    def read_into(self, name: str, target: Tensor) -> None:
        """See TensorSource."""
        file_name = self._file_name(name)
        target.copy_(self._where[file_name].get_tensor(file_name))
        if self._norm_offset and name.endswith("norm"):
            target.add_(self._norm_offset)

    def form(self, name: str) -> None:
        """See TensorSource: none of the dtypes is packed as it is."""
        return

    def raw(self, name: str) -> NDArray[Any]:
        """See TensorSource."""
        raise NotImplementedError(name)  # no tensor has a form

    def release(self, name: str) -> None:
        """See TensorSource: tensors are read, not mapped."""

    def kv_scales(self, config: ModelConfig, device: torch.device) -> KVScales | None:
        """See TensorSource: one value a layer, or one a KV head, under the names of `KV_SCALE`."""
        if not self._kv_scales:
            return None
        rows: dict[str, list[Tensor]] = {"k": [], "v": []}
        for layer in range(config.num_layers):
            for kind, found in rows.items():
                name = self._kv_scales.get((layer, kind))
                if name is None:
                    raise ModelFileError(
                        f"tokenstep.load: {self.source}: layer {layer} has no {kind}_scale, others have one"
                    )
                values = self._where[name].get_tensor(name).float().flatten()
                fits = values.numel() in (1, config.num_kv_heads)
                if not fits or not (values.isfinite() & (values > 0)).all():
                    raise ModelFileError(
                        f"tokenstep.load: {self.source}: {name} = {shown(values.tolist())}, expected 1 or"
                        f" {config.num_kv_heads} finite numbers above 0"
                    )
                found.append(values.expand(config.num_kv_heads))
        return KVScales(*(torch.stack(found).to(device) for found in rows.values()))

    def unexpected(self) -> Iterable[str]:
        """See TensorSource."""
        return self._unexpected

    def _file_name(self, name: str) -> str:
        if name in NAMES:
            return NAMES[name]
        _, index, kind, *suffix = name.split(".")
        return f"model.layers.{index}.{self._layer_names[kind]}.{suffix[0] if suffix else 'weight'}"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order of name; raises ModelFileError where one is missing."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).is_file():
            raise ModelFileError(f"tokenstep.load: {folder}: has neither {SINGLE} nor {INDEX}")
        return [folder / SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ModelFileError(
            f"tokenstep.load: {index}: expected an object with weight_map, from tensors to files beside it"
        ) from None
    for name in names:
        if not (folder / name).is_file():
            raise ModelFileError(f"tokenstep.load: {index}: names {name}, which the folder lacks")
    return [folder / name for name in names]


def hf_weights_id(folder: Path) -> str:
    """Twelve hex digits from config.json and, of each file, its size and 4 KiB at 64 places."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for place in range(64):
                file.seek(place * max(0, size - 4096) // 63)
                digest.update(file.read(4096))
    return digest.hexdigest()[:12]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ModelFileError(f"tokenstep.load: {path.name}: {error} (is the file complete?)") from None
