"""Adapters in PEFT's format: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Only LoRA on the decoder's projections; whatever else a configuration asks for is refused by name.
"""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tokenstep.models.config import ModelConfig
from tokenstep.models.errors import ModelFileError, ModelNotFound, UnsupportedConfig
from tokenstep.models.fields import Fields, one_of, read_object
from tokenstep.models.lora import PRODUCTS, LoraAdapter, LowRank, make_adapter, projection_shape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULES = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "output",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
TENSOR = re.compile(
    r"base_model\.model\.(?P<module>(?:model\.)?layers\.(?P<layer>\d{1,6})\.(?P<name>\w+\.\w+))"
    r"\.lora_(?P<matrix>[AB])\.weight"
)
DTYPES = ("F32", "F16", "BF16", "F64")
READ = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules")
HARMLESS = (  # they matter in training, or are seen from the tensors that there are
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "task_type", "eva_config", "ensure_weight_tying"),
    *("exclude_modules", "layers_pattern", "layers_to_transform"),
)
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""What `init_lora_weights` may be: the other ways to begin change the model's own weights too."""


def load_adapter(
    path: str | Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, in_tiles: bool = False
) -> LoraAdapter:
    """The adapter in the folder `path`, for a model of this shape.

    Args:
        path: the folder.
        config: the model's shape.
        dtype: what the model computes in.
        device: where it is.
        in_tiles: the model is batch-invariant.

    Raises:
        ModelNotFound: there is no adapter.
        ModelFileError: a file is damaged, incomplete or doesn't fit the model.
        UnsupportedConfig: the adapter needs something that tokenstep doesn't have; the message names it.
    """
    folder = Path(path).expanduser()
    if not (folder / CONFIG).is_file():
        raise ModelNotFound(f"tokenstep.load: adapter = {str(path)!r}, expected a folder with {CONFIG}")
    if not (folder / WEIGHTS).is_file():
        raise ModelFileError(f"tokenstep.load: {folder}: has no {WEIGHTS} (pickled weights aren't read)")
    fields = Fields(read_object(folder / CONFIG), CONFIG)
    _check_config(fields)
    ranks = _Ranks(fields)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            projections = _read(file, config, ranks, dtype, device)
    except SafetensorError as error:
        raise ModelFileError(f"tokenstep.load: {WEIGHTS}: {error} (is the file complete?)") from None
    _check_complete(fields, config, projections)
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    digest.update((folder / WEIGHTS).read_bytes())
    return make_adapter(digest.digest(), config, projections, in_tiles)


def _check_config(fields: Fields) -> None:
    if fields.text("peft_type") != "LORA":
        raise fields.unsupported("peft_type", "'LORA'")
    if fields.get("bias", "none") != "none":
        raise fields.unsupported("bias", "'none'")
    if fields.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise fields.unsupported("init_lora_weights", one_of([str(start) for start in PLAIN_STARTS]))
    for name in fields.values.keys() - {*READ, *HARMLESS, "bias", "init_lora_weights"}:
        fields.refuse(name, "it isn't plain LoRA")


class _Ranks:
    """Rank and scale of each module."""

    def __init__(self, fields: Fields) -> None:
        self._rank = fields.integer("r")
        self._alpha = fields.number("lora_alpha")
        self._by_root = fields.flag("use_rslora", False)
        ranks, alphas = fields.nested("rank_pattern"), fields.nested("alpha_pattern")
        self._ranks = [(_pattern(name, ranks), ranks.integer(name)) for name in ranks.values]
        self._alphas = [(_pattern(name, alphas), alphas.number(name)) for name in alphas.values]

    def rank(self, module: str) -> int:
        """Of the module of this name; the first pattern that ends like it counts."""
        return next((rank for pattern, rank in self._ranks if pattern.match(module)), self._rank)

    def scale(self, module: str) -> float:
        """What its product is multiplied by."""
        alpha = next((alpha for pattern, alpha in self._alphas if pattern.match(module)), self._alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self._by_root else rank)


def _pattern(name: str, fields: Fields) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({name})$")
    except re.error:
        raise fields.wrong(name, "names that are regular expressions") from None


def _read(
    file: Any, config: ModelConfig, ranks: _Ranks, dtype: torch.dtype, device: torch.device
) -> dict[tuple[int, str], LowRank]:
    """All updates, by layer and projection."""
    names: dict[tuple[int, str], dict[str, str]] = {}
    modules: dict[tuple[int, str], str] = {}
    for tensor in file.keys():  # noqa: SIM118
        found = TENSOR.fullmatch(tensor)
        if found is None or found["name"] not in MODULES:
            raise UnsupportedConfig(
                f"tokenstep.load: {WEIGHTS}: {tensor} is no LoRA matrix of {one_of(tuple(MODULES))}"
            )
        key = int(found["layer"]), MODULES[found["name"]]
        if key[0] >= config.num_layers:
            raise ModelFileError(
                f"tokenstep.load: {WEIGHTS}: {tensor}, but the model has {config.num_layers} layers"
            )
        names.setdefault(key, {})[found["matrix"]] = tensor
        modules[key] = found["module"]
    projections = {}
    for key, pair in names.items():
        rank, (out, size) = ranks.rank(modules[key]), projection_shape(config, key[1])
        for matrix, shape in (("A", (rank, size)), ("B", (out, rank))):
            _check_matrix(file, modules[key], matrix, pair.get(matrix), shape)
        a, b = (file.get_tensor(pair[matrix]).float() for matrix in "AB")
        b = b * ranks.scale(modules[key])
        projections[key] = LowRank(a.to(device, dtype), b.to(device, dtype))
    return projections


def _check_matrix(file: Any, module: str, matrix: str, name: str | None, shape: tuple[int, int]) -> None:
    if name is None:
        raise ModelFileError(f"tokenstep.load: {WEIGHTS}: {module} has no lora_{matrix}")
    entry = file.get_slice(name)
    if tuple(entry.get_shape()) != shape:
        raise ModelFileError(
            f"tokenstep.load: {WEIGHTS}: {name} has shape {list(entry.get_shape())}, expected {list(shape)}"
        )
    if entry.get_dtype() not in DTYPES:
        raise UnsupportedConfig(
            f"tokenstep.load: {WEIGHTS}: {name} has dtype {entry.get_dtype()}, expected {one_of(DTYPES)}"
        )


def _check_complete(fields: Fields, config: ModelConfig, projections: dict[tuple[int, str], LowRank]) -> None:
    """Where the configuration names modules, each layer has them."""
    if not projections:
        raise ModelFileError(f"tokenstep.load: {WEIGHTS}: has no tensors")
    targets = fields.get("target_modules")
    if not isinstance(targets, list) or fields.has("layers_to_transform") or fields.has("exclude_modules"):
        return
    for module, name in MODULES.items():
        if module in targets or module.split(".")[1] in targets:
            for layer in range(config.num_layers):
                if (layer, name) not in projections:
                    raise ModelFileError(f"tokenstep.load: {WEIGHTS}: layer {layer} has no {module}")


assert set(MODULES.values()) == PRODUCTS.keys()
