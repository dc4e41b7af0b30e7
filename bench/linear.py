"""What a product costs in each form of the weights: our kernel, torch's bfloat16 GEMM, torch's 4-bit GEMV.

For each matrix of the default model (SmolLM2-135M: four a layer and the head) and numbers of rows, in turn.
The floor is one read of the weights in the form that the file has them in. The weights rotate through copies
of more than the last cache. torch's 4-bit product takes bfloat16 scales: its results are not the file's.

    python bench/linear.py [--rows 1,8,32] [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F

from tokenstep._native import cpu
from tokenstep.bench.report import FLOOR, OURS, Report
from tokenstep.bench.timer import interleave
from tokenstep.models.memory import HugePages
from tokenstep.models.packed_linear import PackedWeight

SHAPES = {  # name: outputs, inputs, the form in the file
    "qkv": (960, 576, "q4_1"),
    "attention output": (576, 576, "q4_1"),
    "gate, up": (3072, 576, "q4_1"),
    "down": (576, 1536, "q4_1"),
    "head": (49152, 576, "q8_0"),
}
COLD_BYTES = 64 << 20
GROUP = 32
Product = Callable[[], object]


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=None)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each shape and number of rows")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = Report("linear", {"threads": torch.get_num_threads(), "dtype": "bfloat16"})
    floors = torch.zeros(256 << 20, dtype=torch.uint8)
    for name, (outputs, inputs, form) in SHAPES.items():
        products = {
            OURS: packed(form, outputs, inputs),
            "bfloat16, packed": packed("bfloat16", outputs, inputs),
            "torch bfloat16": dense(outputs, inputs),
            "torch 4-bit": four_bits(outputs, inputs),
        }
        size = PackedWeight(form, outputs, inputs, torch.bfloat16, HugePages()).num_bytes
        parts = cycle(torch.split(floors, size)[: max(1, len(floors) // size)])
        for rows in args.rows or [1, 2, 4, 8, 16, 32, 64, 512]:
            if name == "head" and rows > 64:
                continue  # only last tokens get there
            x = torch.randn(rows, inputs).bfloat16()
            calls: dict[str, Product] = {impl: product(x) for impl, product in products.items()}
            calls[FLOOR] = lambda parts=parts: cpu.testing.read_max(next(parts))
            for impl, timing in interleave(calls, budget_s=args.budget).items():
                report.add({"matrix": name, "weights": form, "rows": rows, "impl": impl}, timing)
    print(report.markdown())
    if args.json:
        report.save(args.json)


def copies(num_bytes: int) -> int:
    """How many copies of so many bytes no cache holds."""
    return -(-COLD_BYTES // num_bytes)


def packed(form: str, outputs: int, inputs: int) -> Callable[[torch.Tensor], Product]:
    """Our kernel."""
    pages = HugePages()
    size = PackedWeight(form, outputs, inputs, torch.bfloat16, HugePages()).num_bytes
    weights = [PackedWeight(form, outputs, inputs, torch.bfloat16, pages) for _ in range(copies(size))]
    for weight in weights:
        weight.pack(torch.randint(0, 60, (outputs, size // (-(-outputs // 16) * 16)), dtype=torch.uint8))
    each = cycle(weights)
    return lambda x: lambda: next(each).project(x, None, None)


def dense(outputs: int, inputs: int) -> Callable[[torch.Tensor], Product]:
    """The bfloat16 product of torch."""
    each = cycle([torch.randn(outputs, inputs).bfloat16() for _ in range(copies(2 * outputs * inputs))])
    return lambda x: lambda: F.linear(x, next(each))


def four_bits(outputs: int, inputs: int) -> Callable[[torch.Tensor], Product]:
    """The product of torch with 4-bit weights, groups of 32 with scale and zero."""
    integers = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
    weights = [
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
        for _ in range(copies(outputs * inputs // 2))
    ]
    scales = torch.rand(inputs // GROUP, outputs, 2).bfloat16()
    each = cycle(weights)
    return lambda x: lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, next(each), GROUP, scales)


if __name__ == "__main__":
    main()
