"""The types of a GGUF file's tensors.

Those of most files are known here; the gguf package, which takes a while to import, is asked about others.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple


class GgmlType(NamedTuple):
    """A type: its number in files, its name, and how many numbers a block has and how many bytes it takes."""

    number: int
    name: str
    block: int
    block_bytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` numbers, a multiple of `block`."""
        return columns // self.block * self.block_bytes


KNOWN = {
    kind.number: kind
    for kind in (
        GgmlType(0, "F32", 1, 4),
        GgmlType(1, "F16", 1, 2),
        GgmlType(30, "BF16", 1, 2),
        GgmlType(2, "Q4_0", 32, 18),
        GgmlType(3, "Q4_1", 32, 20),
        GgmlType(8, "Q8_0", 32, 34),
    )
}


@cache
def ggml_type(number: int) -> GgmlType | None:
    """The type of this number; None if the installed gguf package doesn't know it either."""
    if number in KNOWN:
        return KNOWN[number]
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        return None
    return GgmlType(number, kind.name, *GGML_QUANT_SIZES[kind])
