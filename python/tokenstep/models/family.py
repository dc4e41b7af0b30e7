"""What a family states: how its files' metadata becomes a ModelConfig, how its tensors are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tokenstep.models.config import ModelConfig
from tokenstep.models.fields import Fields


@dataclass(frozen=True)
class GgufModel:
    """What a GGUF file says of its model: metadata, tensor shapes, the values of `rope_freqs.weight`."""

    fields: Fields
    shapes: Mapping[str, tuple[int, ...]]
    rope_factors: tuple[float, ...]


@dataclass(frozen=True)
class Family:
    """One family of models.

    `name` is both the `model_type` of config.json and the `general.architecture` of a GGUF file.
    `gguf_config` is None for families that GGUF stores under another architecture. `hf_norm_offset` is what a
    Hugging Face checkpoint leaves out of its norm weights. `gguf_interleaves_qk`: the rows of q and k stand
    in GGUF in interleaved pairs, not in halves.
    """

    name: str
    hf_config: Callable[[Fields], ModelConfig]
    gguf_config: Callable[[GgufModel], ModelConfig] | None
    hf_norm_offset: float = 0.0
    gguf_interleaves_qk: bool = False
