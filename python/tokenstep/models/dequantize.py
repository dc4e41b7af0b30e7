"""Tensor data of a GGUF file to numbers: every ggml type for which the gguf package has code."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from numpy.typing import NDArray
from torch import Tensor

from tokenstep.models.errors import UnsupportedConfig

PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
# gguf works in groups of 16 rows. Rows of this many numbers make groups that fit the second-level cache and
# are long enough that Python's share of the time is small.
ROW_NUMBERS = 8192


def dequantize(raw: NDArray[np.uint8], kind: GGMLQuantizationType, name: str) -> Tensor:
    """The numbers of `raw` [rows, bytes of a row] as a tensor [rows, columns].

    float32, or the file's own dtype for F16 and BF16. Raises UnsupportedConfig, with the tensor's name, for a
    type that has no code.
    """
    block, size = GGML_QUANT_SIZES[kind]
    columns = raw.shape[1] // size * block
    if kind in PLAIN:
        return torch.from_numpy(raw.copy()).view(PLAIN[kind])
    try:
        values = quants.dequantize(_longer_rows(raw, max(1, ROW_NUMBERS // columns)), kind)
    except NotImplementedError:
        raise UnsupportedConfig(
            f"tokenstep.load: tensor {name!r} has ggml type {kind.name}, which the gguf package can't decode"
        ) from None
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(raw.shape[0], columns)


def _longer_rows(raw: NDArray[np.uint8], joined: int) -> NDArray[np.uint8]:
    """The same bytes with `joined` rows in one, or the largest number below that divides the rows."""
    rows = raw.shape[0]
    while rows % joined:
        joined -= 1
    return raw.reshape(rows // joined, -1)
