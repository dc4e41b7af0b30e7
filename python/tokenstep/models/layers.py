"""The dense pieces of the decoder: projection, norm, gate, soft cap. Everything dense goes through `Linear`.

A library's matrix product chooses its kernel by the number of rows, so that a value's last bits may depend on
what else is computed with it. Where they must not, products are made in tiles of `TILE_ROWS` rows, one call
each: shape, dtype and alignment, by which cuBLAS and oneDNN choose, are then always the same. (Alignment is
where columns come in fours, since a tile then begins at a multiple of 256 bytes.)

The rest is one operation of ours each on a CPU, where torch takes several and splits them between threads at
places that depend on the number of rows; each row is computed alone, in float32, and rounded once. On a GPU
it is torch's.

`Linear` on a CPU: oneDNN makes the products of bfloat16 and float16. It compiles a kernel for each number of
rows, which takes some ten milliseconds, and keeps it, about half a megabyte. So that a server whose batches
have any size soon has them all, numbers of rows above `TILE_ROWS` are rounded up (`round_rows`).
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenstep._native import cpu

TILE_ROWS = 32
ROW_COUNTS_AN_OCTAVE = 8  # numbers of rows between a power of two and the next


class Projection(Protocol):
    """y = x Wᵀ + b: `Linear`, or `PackedLinear` with packed weights."""

    bias: Tensor | None

    @property
    def form(self) -> str:
        """What the weights are when they are multiplied."""
        ...

    @property
    def weight(self) -> Tensor:
        """[out, in]."""
        ...

    @property
    def num_bytes(self) -> int:
        """What weights and bias take."""
        ...

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, in] to [T, out]. `out` is room for the result, which needn't be used."""
        ...

    def added_to(self, residual: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Residual [T, out] + the projection of x [T, in]: a new tensor, or `out`, even the residual."""
        ...

    def as_batch_invariant(self) -> Projection:
        """The same weights in a form where a row's result doesn't depend on what other rows there are."""
        ...


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

    @property
    def form(self) -> str:
        """A tensor, multiplied by torch."""
        return "dense"

    @property
    def num_bytes(self) -> int:
        """What weights and bias take."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, in] to [T, out], a new tensor."""
        if self.in_tiles:
            return self._project_tiles(x)
        rows = len(x)
        if self.rounds_rows and (missing := round_rows(rows) - rows):
            return F.linear(F.pad(x, (0, 0, 0, missing)), self.weight, self.bias)[:rows]
        return F.linear(x, self.weight, self.bias)

    def added_to(self, residual: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Residual [T, out] + the projection of x [T, in]: a new tensor, or `out`."""
        return torch.add(residual, self(x), out=out)

    def as_batch_invariant(self) -> Linear:
        """The same with every product in tiles."""
        return Linear(self.weight, self.bias, in_tiles=True)

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


class Gate:
    """The gate of SwiGLU and GeGLU: activation(gate) · up.

    Args:
        activation: "silu", or "gelu_tanh", gelu in its approximation with tanh.
    """

    __slots__ = ("activation",)

    def __init__(self, activation: str) -> None:
        self.activation = activation

    def __call__(self, gate_up: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, 2 size], the gate first, to [T, size]. `out` is room for the result, which needn't be used."""
        if gate_up.is_cpu:
            return cast(Tensor, cpu.gate(gate_up, self.activation, out))
        gate, up = gate_up.chunk(2, 1)
        return (F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Caps logits [T, size] in place: cap · tanh(logits / cap)."""
    if logits.is_cpu:
        cpu.soft_cap(logits, cap)
        return logits
    return logits.div_(cap).tanh_().mul_(cap)


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

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, size] to the same shape and dtype. `out` is room for the result, which needn't be used."""
        if x.is_cpu:
            return cast(Tensor, cpu.rms_norm(x, self.weight, self.eps, out))
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
        if x.is_cpu:
            return cast(Tensor, cpu.rms_norm(x, self.weight, self.eps))
        normed = F.rms_norm(x.float(), (x.shape[-1],), None, self.eps)
        return (normed * self.weight).to(x.dtype)
