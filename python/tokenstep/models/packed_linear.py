"""Weights that stay as they are stored, multiplied by our own kernel on a CPU.

GGUF's Q4_0, Q4_1 and Q8_0 keep their bits: a product reads a third or half of what bfloat16 takes. The kernel
multiplies the integers exactly, sums in float32 and applies scale and minimum to the sum of each block of 32,
so that no weight is rounded; the result is rounded once. A row has the same bits whatever rows are beside it.
bfloat16 matrices are packed too where the CPU has a bfloat16 dot product. Matrix units (AMX) are torch's to
use: for many rows it gets the numbers, unless a row's bits may not depend on what other rows there are.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenstep import _native
from tokenstep.models.cpu import cpu_flags
from tokenstep.models.memory import HugePages

BLOCK = 32  # columns that have a scale in common
QUANTISED = ("q4_0", "q4_1", "q8_0")
MATRIX_UNIT_ROWS = 128
"""From so many rows on, matrix units outweigh that bfloat16 numbers must be unpacked first."""


class PackedWeight:
    """A weight matrix [rows, columns] on the CPU, in the kernel's order.

    Args:
        form: "q4_0", "q4_1", "q8_0" or "bfloat16".
        rows: outputs.
        columns: inputs, a multiple of 32.
        dtype: of what `embed` and products give.
        pages: where its memory comes from.
    """

    __slots__ = ("_matrix", "dtype", "form", "num_bytes", "shape")

    def __init__(self, form: str, rows: int, columns: int, dtype: torch.dtype, pages: HugePages) -> None:
        self.num_bytes = self.num_bytes_of(form, rows, columns)
        self._matrix = _native.cpu.PackedMatrix(form, rows, columns, pages.take(self.num_bytes))
        self.form = form
        self.shape = (rows, columns)
        self.dtype = dtype

    @staticmethod
    def num_bytes_of(form: str, rows: int, columns: int) -> int:
        """What such a matrix takes."""
        return int(_native.cpu.PackedMatrix.num_bytes_of(form, rows, columns))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return torch.device("cpu")

    def pack(self, raw: NDArray[Any] | Tensor, first_row: int = 0) -> None:
        """Fills rows from `first_row` on: uint8 [rows, bytes of a row], as in the file."""
        self._matrix.pack(raw, first_row)

    def embed(self, ids: Tensor) -> Tensor:
        """Rows by their numbers: int64 [T] to [T, columns], each number rounded once."""
        out = torch.empty((len(ids), self.shape[1]), dtype=self.dtype)
        self._matrix.gather(ids, out)
        return out

    def dense(self) -> Tensor:
        """All numbers [rows, columns]."""
        return self.embed(torch.arange(self.shape[0]))

    def project(
        self, x: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """X Wᵀ + bias + residual: [T, columns] to [T, rows], rounded once; into `out`, if given."""
        if out is None:
            out = torch.empty((len(x), self.shape[0]), dtype=x.dtype)
        self._matrix.linear(x, out, bias, residual)
        return out


class PackedLinear:
    """y = x Wᵀ + b, as `layers.Linear`, with packed weights.

    Args:
        packed: [out, in].
        bias: [out] or None.
        in_one_path: our kernel computes all products, however many rows they have.
    """

    __slots__ = ("_unpack_from", "bias", "packed")

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None, in_one_path: bool = False) -> None:
        self.packed = packed
        self.bias = bias
        leaves = not in_one_path and packed.form == "bfloat16" and has_matrix_units()
        self._unpack_from = MATRIX_UNIT_ROWS if leaves else sys.maxsize

    @property
    def form(self) -> str:
        """What the weights are: "q4_0", "q4_1", "q8_0" or "bfloat16", with "_amx" where torch takes part."""
        return self.packed.form if self._unpack_from == sys.maxsize else f"{self.packed.form}_amx"

    @property
    def weight(self) -> Tensor:
        """The numbers [out, in], a new tensor each time."""
        return self.packed.dense()

    @property
    def num_bytes(self) -> int:
        """What weights and bias take."""
        return self.packed.num_bytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, in] to [T, out]: a new tensor, or `out`."""
        if len(x) >= self._unpack_from:
            return torch.nn.functional.linear(x, self.packed.dense(), self.bias)
        return self.packed.project(x, self.bias, None, out)

    def added_to(self, residual: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Residual [T, out] + the projection of x [T, in], rounded once: a new tensor, or `out`."""
        if len(x) >= self._unpack_from:
            return torch.add(residual, self(x), out=out)
        return self.packed.project(x, self.bias, residual, out)

    def as_batch_invariant(self) -> PackedLinear:
        """The same weights, all products by our kernel; itself where it does them anyway."""
        if self._unpack_from == sys.maxsize:
            return self
        return PackedLinear(self.packed, self.bias, in_one_path=True)


def embed(ids: Tensor, embedding: Tensor | PackedWeight) -> Tensor:
    """The rows of an embedding: int64 [T] to [T, hidden_size]."""
    if isinstance(embedding, PackedWeight):
        return embedding.embed(ids)
    return torch.nn.functional.embedding(ids, embedding)


def form_of(forms: set[str | None], columns: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """The form in which a matrix of `columns` is packed; None: it becomes a tensor of `dtype`.

    Decided by shapes, types and the CPU alone, never by timing.

    Args:
        forms: what its parts are in the file, None for what may not or cannot stay as it is.
        columns: inputs.
        dtype: what the model computes in.
        device: where the model is.
    """
    if device.type != "cpu" or columns % BLOCK:
        return None
    if len(forms) == 1 and (form := next(iter(forms))) in QUANTISED:
        return form
    return "bfloat16" if dtype == torch.bfloat16 and packs_bfloat16() else None


def packs_bfloat16() -> bool:
    """Whether our kernel has a bfloat16 dot product here."""
    return _native.cpu.isa() == "avx512_bf16"


@functools.cache
def has_matrix_units() -> bool:
    """Whether the CPU multiplies bfloat16 matrices (AMX)."""
    return "amx_bf16" in cpu_flags()
