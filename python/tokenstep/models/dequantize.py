"""Tensor data of a GGUF file to numbers: every ggml type for which the gguf package has code."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenstep.models.ggml_types import KNOWN, GgmlType

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Numbers decoded at a time: few enough to stay in the second-level cache between decoding and the copy to
# their place, many enough that Python's share of the time is small.
CHUNK = 1 << 17


def dequantize_into(raw: NDArray[np.uint8], kind: GgmlType, target: Tensor) -> None:
    """Decodes `raw` [rows, bytes of a row] into `target` [rows, …], in its dtype and strides.

    No more than a few rows exist beside `target`.
    """
    step = max(1, CHUNK // (raw.shape[1] // kind.block_bytes * kind.block))
    for start in range(0, raw.shape[0], step):
        place = target[start : start + step]
        place.copy_(dequantize(raw[start : start + step], kind).view(place.shape))


def dequantize(raw: NDArray[np.uint8], kind: GgmlType) -> Tensor:
    """The numbers of `raw` [rows, bytes of a row], flat, float32 or the file's own F16 or BF16."""
    if kind.name in PLAIN:
        return torch.from_numpy(raw.reshape(-1).copy()).view(PLAIN[kind.name])
    return torch.from_numpy(_decode(raw.reshape(1, -1), kind).reshape(-1))


@cache
def is_decodable(kind: GgmlType) -> bool:
    """Whether there is code for `kind`."""
    if kind.number in KNOWN:
        return True
    try:
        _decode(np.zeros((1, kind.block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _decode(raw: NDArray[np.uint8], kind: GgmlType) -> NDArray[np.float32]:
    from gguf import GGMLQuantizationType, quants

    numbers: NDArray[np.float32] = quants.dequantize(raw, GGMLQuantizationType(kind.number))
    return numbers
