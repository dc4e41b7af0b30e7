"""The paged KV cache: its dtypes, and the scales of those of one byte.

A cache of one byte an element (float8_e4m3, int8) holds a key or value divided by a scale of its layer and KV
head (docs/attention.md). Scales never change while the cache lives, so that a block's contents are a function
of its tokens: the prefix cache, copies of blocks and recomputation need know nothing of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenstep.models.config import ModelConfig
from tokenstep.models.fields import one_of
from tokenstep.models.memory import lazy_zeros

KV_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}
LARGEST_CODES = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""Of the quantised dtypes."""


def choose_kv_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype that `kv_cache_dtype` means beside a model's: "auto" is the model's own.

    Raises ValueError for an unknown name, or for another float than the model's, which no kernel has.
    """
    own = str(model_dtype).removeprefix("torch.")
    if name not in ("auto", *KV_DTYPES):
        raise ValueError(f"tokenstep.engine: kv_cache_dtype = {name!r}, expected {kv_dtype_names()}")
    dtype = model_dtype if name == "auto" else KV_DTYPES[name]
    if dtype != model_dtype and dtype not in LARGEST_CODES:
        raise ValueError(
            f"tokenstep.engine: kv_cache_dtype = {name!r}, but the model computes in {own}: expected"
            f" {one_of(('auto', own, 'float8_e4m3', 'int8'))}"
        )
    return dtype


def kv_dtype_names() -> str:
    """All that `kv_cache_dtype` may be, for messages."""
    return one_of(("auto", *KV_DTYPES))


def kv_dtype_name(dtype: torch.dtype) -> str:
    """The name of a cache's dtype."""
    return next(name for name, known in KV_DTYPES.items() if known == dtype)


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take, of all layers."""
    return 2 * config.num_layers * config.kv_size * dtype.itemsize


@dataclass(frozen=True)
class KVScales:
    """What a quantised cache's codes are multiplied by, float32 [num_layers, num_kv_heads] each."""

    k: Tensor
    v: Tensor


@dataclass
class KVCache:
    """Keys and values by layer: k[i], v[i] are [num_blocks, block_size, num_kv_heads, head_dim].

    `scales` belong to a quantised dtype, and are None for the others.
    """

    k: list[Tensor]
    v: list[Tensor]
    scales: KVScales | None = None

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        scales: KVScales | None = None,
    ) -> KVCache:
        """Zeroed blocks for every layer of `config`; on a CPU they take memory only once they are written.

        Raises ValueError if `dtype` is quantised and `scales` are missing, or the other way round.
        """
        if (dtype in LARGEST_CODES) != (scales is not None):
            raise ValueError(
                f"tokenstep.KVCache: dtype = {kv_dtype_name(dtype)} with scales = {scales}: a quantised cache"
                " has scales, no other has"
            )
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)

        def layers() -> list[Tensor]:
            return [lazy_zeros(shape, dtype, device) for _ in range(config.num_layers)]

        return cls(layers(), layers(), scales)

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.k[0].dtype

    @property
    def num_blocks(self) -> int:
        """Blocks of each layer."""
        return len(self.k[0])

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.k[0].shape[1]

    @property
    def num_bytes(self) -> int:
        """What keys and values take once all of them are written."""
        return sum(layer.nbytes for layers in (self.k, self.v) for layer in layers)

    def copy_blocks(self, sources: Tensor, copies: Tensor) -> None:
        """Copies blocks of all layers; int64 [N] each, no block both a source and a copy."""
        for layers in (self.k, self.v):
            for layer in layers:
                codes = layer.view(torch.uint8) if layer.itemsize == 1 else layer  # float8 has few operations
                codes[copies] = codes[sources]

    def layer_scales(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """Scales [num_kv_heads] of the keys and values of a layer."""
        if self.scales is None:
            return None, None
        return self.scales.k[index], self.scales.v[index]
