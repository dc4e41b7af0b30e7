"""The weights of a GGUF file under our names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenstep.models.config import ModelConfig
from tokenstep.models.dequantize import dequantize, dequantize_into, is_decodable
from tokenstep.models.errors import ModelFileError, UnsupportedConfig
from tokenstep.models.gguf_file import GgufFile, GgufTensor
from tokenstep.models.packed_linear import QUANTISED

NAMES = {"embedding": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}
LAYER_NAMES = {
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "output": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "post_attention_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "post_mlp_norm": "post_ffw_norm",
}
ROPE_FACTORS = "rope_freqs.weight"


class GgufWeights:
    """A TensorSource over an open file.

    Args:
        file: the open file.
        config: the model's shape.
        interleaved_qk: the rows of q and k stand in pairs (0, 1), (2, 3) …; ours are (0, D/2), (1, D/2 + 1) …
    """

    def __init__(self, file: GgufFile, config: ModelConfig, interleaved_qk: bool) -> None:
        self.source = file.path.name
        self._file = file
        self._config = config
        self._interleaved_qk = interleaved_qk
        self._unexpected = set(file.tensors) - {ROPE_FACTORS}

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """See TensorSource."""
        file_name = gguf_name(name)
        tensor = self._file.tensors.get(file_name)
        if tensor is None:
            raise ModelFileError(f"tokenstep.load: {self.source}: the tensor {file_name} is missing")
        if tensor.shape != shape:
            raise ModelFileError(
                f"tokenstep.load: {self.source}: {file_name} has shape {list(tensor.shape)}, expected"
                f" {list(shape)}"
            )
        _check_kind(tensor, self.source)
        self._unexpected.discard(file_name)

    def read_into(self, name: str, target: Tensor) -> None:
        """See TensorSource."""
        tensor = self._file.tensors[gguf_name(name)]
        raw = self._file.raw(tensor)
        place = target
        if self._is_interleaved(name):
            place = pairs(target, self._config.head_dim)
        if target.dim() == 1:
            place = place[None]
        # one row of the target at a time may be a whole head of the file's rows
        dequantize_into(raw.reshape(place.shape[0], -1), tensor.kind, place)
        self._file.release(tensor)

    def form(self, name: str) -> str | None:
        """See TensorSource."""
        form = self._file.tensors[gguf_name(name)].kind.name.lower()
        return form if form in QUANTISED else None

    def raw(self, name: str) -> NDArray[np.uint8]:
        """See TensorSource."""
        tensor = self._file.tensors[gguf_name(name)]
        rows = self._file.raw(tensor)
        if not self._is_interleaved(name):
            return rows
        half = self._config.head_dim // 2
        return rows.reshape(-1, half, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)

    def release(self, name: str) -> None:
        """See TensorSource."""
        self._file.release(self._file.tensors[gguf_name(name)])

    def kv_scales(self, config: ModelConfig, device: torch.device) -> None:
        """See TensorSource: GGUF has no place for them."""
        return

    def _is_interleaved(self, name: str) -> bool:
        return self._interleaved_qk and name.removesuffix(".bias").endswith((".q", ".k"))

    def unexpected(self) -> Iterable[str]:
        """See TensorSource."""
        return self._unexpected


def gguf_name(name: str) -> str:
    """Our name of a tensor to GGUF's: `layers.3.q` to `blk.3.attn_q.weight`."""
    if name in NAMES:
        return NAMES[name]
    _, index, kind, *suffix = name.split(".")
    return f"blk.{index}.{LAYER_NAMES[kind]}.{suffix[0] if suffix else 'weight'}"


def pairs(target: Tensor, head_dim: int) -> Tensor:
    """A view [heads, D/2, 2, …] of `target` [heads · D, …]: rows that rotate together stand together."""
    return target.view(-1, 2, head_dim // 2, *target.shape[1:]).transpose(1, 2)


def rope_factors(file: GgufFile) -> tuple[float, ...]:
    """The values of `rope_freqs.weight`; () without it."""
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return ()
    _check_kind(tensor, file.path.name)
    return tuple(dequantize(file.raw(tensor), tensor.kind).tolist())


def _check_kind(tensor: GgufTensor, source: str) -> None:
    if not is_decodable(tensor.kind):
        raise UnsupportedConfig(
            f"tokenstep.load: {source}: {tensor.name} has ggml type {tensor.kind.name}, which the gguf"
            " package can't decode"
        )


def gguf_weights_id(file: GgufFile) -> str:
    """Twelve hex digits from the header, the table and 128 bytes at three places of each tensor."""
    digest = hashlib.sha256(file.header())
    for tensor in file.tensors.values():
        last = max(0, tensor.num_bytes - 128)
        for offset in (0, last // 2, last):
            digest.update(file.bytes_at(tensor.start + offset, min(128, tensor.num_bytes)))
    return digest.hexdigest()[:12]
