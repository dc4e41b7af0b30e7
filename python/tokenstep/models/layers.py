"""The dense pieces of the decoder: projection, norm, gate. Everything dense goes through `Linear`.

A library's matrix product chooses its kernel by the number of rows, and an elementwise function of torch
splits its work between threads by the number of elements, so that a value's last bits may depend on what else
is computed with it. Where they must not, products are made in tiles of `TILE_ROWS` rows, and functions with
an exponential in pieces too small to be split (`in_pieces`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ROWS = 32
ROW_COUNTS_AN_OCTAVE = 8  # numbers of rows between a power of two and the next
UNSPLIT = 16384
"""Elements that torch's functions never split between threads: 32768 in general, half of that in gelu."""


class Linear:
    """y = x Wᵀ + b, optionally with a residual added in the same call.

    Args:
        weight: [out, in].
        bias: [out] or None.
        in_tiles: every product has `TILE_ROWS` rows, the last one filled up with zeros: a row's result has
            the same bits whatever other rows there are.
    """

    __slots__ = ("bias", "in_tiles", "rounds_rows", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, in_tiles: bool = False) -> None:
        self.weight = weight
        self.bias = bias
        self.in_tiles = in_tiles
        self.rounds_rows = weight.device.type == "cpu" and weight.dtype != torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] to [T, out]."""
        if self.in_tiles:
            return self._project_tiles(x)
        rows = len(x)
        if self.rounds_rows and (missing := round_rows(rows) - rows):
            return F.linear(F.pad(x, (0, 0, 0, missing)), self.weight, self.bias)[:rows]
        return F.linear(x, self.weight, self.bias)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Residual [T, out] + the projection of x [T, in], a new tensor."""
        return torch.add(residual, self(x))

    def _project_tiles(self, x: Tensor) -> Tensor:
        rows = len(x)
        if missing := -rows % TILE_ROWS:
            x = F.pad(x, (0, 0, 0, missing))
        tiles = [F.linear(tile, self.weight, self.bias) for tile in torch.split(x, TILE_ROWS)]
        return (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[:rows]


def round_rows(rows: int) -> int:
    """With how many rows a product of `rows` is made: one of few numbers, an eighth more at most."""
    if rows <= TILE_ROWS:
        return rows
    step = (1 << (rows - 1).bit_length()) // (2 * ROW_COUNTS_AN_OCTAVE)
    return -(-rows // step) * step


def in_pieces(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` of tensors [T, size], row by row the same bits whatever T is.

    torch computes the end of a thread's share one by one, with a scalar exponential whose last bit may differ
    from the vector's. A piece that isn't split ends where a row does.
    """
    rows, size = tensors[0].shape
    step = max(1, UNSPLIT // size)
    if rows <= step:
        return function(*tensors)
    pieces = zip(*(torch.split(tensor, step) for tensor in tensors), strict=True)
    return torch.cat([function(*piece) for piece in pieces])


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's gate: silu(gate) · up."""
    return F.silu(gate) * up


def gelu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """GeGLU's gate, with the tanh approximation of gelu."""
    return F.gelu(gate, approximate="tanh") * up


class RMSNorm:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, computed in float32.

    The weight stays float32 unless `dtype` holds all its values exactly; then it takes that dtype, for which
    torch has a fused kernel.
    """

    __slots__ = ("_fused", "_shape", "eps", "weight")

    def __init__(self, weight: Tensor, eps: float, dtype: torch.dtype) -> None:
        narrow = weight.to(dtype)
        self._fused = torch.equal(narrow.float(), weight.float())
        self.weight = narrow if self._fused else weight.float()
        self.eps = eps
        self._shape = (weight.shape[-1],)

    def __call__(self, x: Tensor) -> Tensor:
        """[…, size] to the same shape and dtype."""
        if self._fused:
            return F.rms_norm(x, self._shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self._shape, self.weight, self.eps).to(x.dtype)


class HeadNorm:
    """RMSNorm of each head on its own, with a weight for each head. weight [heads, head_dim]."""

    __slots__ = ("eps", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """[T, heads, head_dim] to the same shape and dtype."""
        normed = F.rms_norm(x.float(), (x.shape[-1],), None, self.eps)
        return (normed * self.weight).to(x.dtype)
