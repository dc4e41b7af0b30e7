"""The weights of a GGUF file under our names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from tokenstep.models.config import ModelConfig
from tokenstep.models.dequantize import dequantize
from tokenstep.models.errors import ModelFileError
from tokenstep.models.gguf_file import GgufFile

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
        self._unread = set(file.tensors) - {ROPE_FACTORS}

    def read_into(self, name: str, target: Tensor) -> None:
        """See TensorSource."""
        file_name = gguf_name(name)
        tensor = self._file.tensors.get(file_name)
        if tensor is None:
            raise ModelFileError(f"tokenstep.load: {self.source}: the tensor {file_name} is missing")
        if tensor.shape != tuple(target.shape):
            raise ModelFileError(
                f"tokenstep.load: {self.source}: {file_name} has shape {list(tensor.shape)}, expected"
                f" {list(target.shape)}"
            )
        self._unread.discard(file_name)
        values = dequantize(self._file.raw(tensor), tensor.kind, file_name)
        kind = name.removesuffix(".bias").rpartition(".")[2]
        if self._interleaved_qk and kind in ("q", "k"):
            values = split_pairs(values.view(target.shape), self._config.head_dim)
        target.copy_(values.view(target.shape))

    def unread(self) -> Iterable[str]:
        """See TensorSource."""
        return self._unread


def gguf_name(name: str) -> str:
    """Our name of a tensor to GGUF's: `layers.3.q` to `blk.3.attn_q.weight`."""
    if name in NAMES:
        return NAMES[name]
    _, index, kind, *suffix = name.split(".")
    return f"blk.{index}.{LAYER_NAMES[kind]}.{suffix[0] if suffix else 'weight'}"


def split_pairs(values: Tensor, head_dim: int) -> Tensor:
    """Within each head of rows, the even ones first, then the odd ones. [heads · head_dim, …] to the same."""
    heads = values.unflatten(0, (-1, head_dim // 2, 2))
    return heads.transpose(1, 2).reshape(values.shape)


def rope_factors(file: GgufFile) -> tuple[float, ...]:
    """The values of `rope_freqs.weight`; () without it."""
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return ()
    return tuple(dequantize(file.raw(tensor), tensor.kind, ROPE_FACTORS).to(torch.float32).flatten().tolist())


def gguf_weights_id(file: GgufFile) -> str:
    """Twelve hex digits from the header, the table and 128 bytes at three places of each tensor."""
    digest = hashlib.sha256(file.header())
    for tensor in file.tensors.values():
        last = max(0, tensor.num_bytes - 128)
        for offset in (0, last // 2, last):
            digest.update(file.bytes_at(tensor.start + offset, min(128, tensor.num_bytes)))
    return digest.hexdigest()[:12]
