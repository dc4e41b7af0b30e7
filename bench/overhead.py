"""What a call costs before any work is done: ns per call by way of binding, for 1, 5 and 20 torch tensors.

Builds one function, the sum of its arguments' addresses, with nanobind (the package's tensor reader, and
nb::ndarray) and with pybind11 (DLPack capsules, and plain integers from ``data_ptr()``), and calls the
package's reader through ``torch.ops`` as well. Then the ops themselves, on inputs so small that the call is
all there is.

    python bench/overhead.py [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tokenstep as ts
import tokenstep.torch_ops
from tokenstep.bench.report import Report
from tokenstep.bench.timer import Timing

HERE = Path(__file__).parent


def build() -> tuple[Any, Any]:
    """Compile both modules into a temporary folder and import them."""
    folder = tempfile.mkdtemp(prefix="tokenstep-overhead-")
    configure = ["cmake", "-S", str(HERE / "overhead"), "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", folder], check=True, stdout=subprocess.DEVNULL)
    sys.path.insert(0, folder)
    return importlib.import_module("overhead_nanobind"), importlib.import_module("overhead_pybind11")


def nanoseconds(function: Callable[[], object]) -> Timing:
    """Median and 20th percentile over 15 repeats of enough calls to fill 20 ms each."""
    number = max(1, int(0.02 / max(timeit.timeit(function, number=50) / 50, 1e-7)))
    samples = sorted(s / number * 1e6 for s in timeit.repeat(function, number=number, repeat=15))
    return Timing(median_us=samples[7], p20_us=samples[3], rounds=15)


def torch_ops(reader: Callable[..., int], count: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The reader behind the dispatcher: by Library.define/impl, and by torch.library.custom_op."""
    names = [f"t{i}" for i in range(count)]
    library = torch.library.Library("tokenstep_overhead", "FRAGMENT")
    library.define(f"read{count}({', '.join('Tensor ' + n for n in names)}) -> int")
    library.impl(f"read{count}", reader, "CPU")
    KEPT.append(library)
    namespace: dict[str, Any] = {"reader": reader, "torch": torch}
    arguments = ", ".join(n + ": torch.Tensor" for n in names)
    exec(f"def custom({arguments}) -> int:\n    return reader({', '.join(names)})", namespace)
    custom = torch.library.custom_op(
        f"tokenstep_overhead::custom{count}", namespace["custom"], mutates_args=()
    )
    return getattr(torch.ops.tokenstep_overhead, f"read{count}"), custom


KEPT: list[Any] = []  # a Library undoes its registrations when it is collected


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    nanobind, pybind11 = build()
    report = Report("overhead", {"unit": "us"})
    for count in (1, 5, 20):
        tensors = [torch.zeros(4) for _ in range(count)]
        arrays = [np.zeros(4, np.float32) for _ in range(count)]
        library_op, custom_op = torch_ops(nanobind.exchange_api, count)
        ways: dict[str, Callable[[], object]] = {
            "nanobind, no reading": lambda t=tensors: nanobind.nothing(*t),
            "nanobind, exchange API and checks (ours)": lambda t=tensors: nanobind.exchange_api(*t),
            "  of this, the checks: requires_grad, is_neg": lambda t=tensors: nanobind.checks(*t),
            "nanobind, nb::ndarray": lambda t=tensors: nanobind.ndarray(*t),
            "nanobind, ours, NumPy arrays": lambda a=arrays: nanobind.exchange_api(*a),
            "pybind11, no reading": lambda t=tensors: pybind11.nothing(*t),
            "pybind11, integers by data_ptr()": lambda t=tensors: pybind11.integers(
                *[x.data_ptr() for x in t]
            ),
            "pybind11, __dlpack__ capsules": lambda t=tensors: pybind11.dlpack(*t),
            "torch.ops, Library.define": lambda t=tensors, op=library_op: op(*t),
            "torch.ops, custom_op": lambda t=tensors, op=custom_op: op(*t),
        }
        for way, call in ways.items():
            report.add({"what": way, "tensors": count, "impl": "tokenstep"}, nanoseconds(call))
    for what, call in op_calls().items():
        report.add({"what": what, "tensors": 0, "impl": "tokenstep"}, nanoseconds(call))
    print("| call | tensors | ns |\n|---|---|---|")
    for row in report.rows:
        print(f"| {row['what']} | {row['tensors'] or ''} | {row['median_us'] * 1e3:.0f} |")
    if args.json:
        report.save(args.json)


def op_calls() -> dict[str, Callable[[], object]]:
    """Whole ops on the smallest inputs: one row of 32 tokens, one sequence of one token."""
    logits = torch.randn(1, 32)
    sampler = ts.Sampler(1, 32, "cpu")
    sampler.admit(0, ts.SamplingParams(temperature=0.8, seed=1), [], [])
    rows = torch.zeros(1, dtype=torch.int32)
    q, cache = torch.randn(1, 1, 8), torch.randn(1, 1, 1, 8)
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    warm, seed = torch.full((1,), 0.8), torch.ones(1, dtype=torch.int64)
    ops = torch.ops.tokenstep
    return {
        "tokenstep.sample, V=32": lambda: ts.sample(logits, temperature=0.8, seed=1),
        "Sampler.step, V=32": lambda: sampler.step(logits, rows),
        "torch.ops.tokenstep.sample, V=32": lambda: ops.sample(logits, temperature=warm, seed=seed),
        "tokenstep.paged_attention, one token": lambda: ts.paged_attention(q, cache, cache, table, lens),
        "torch.ops.tokenstep.paged_attention, one token": lambda: ops.paged_attention(
            q, cache, cache, table, lens
        ),
        "torch.softmax, V=32": lambda: torch.softmax(logits, -1),
    }


if __name__ == "__main__":
    main()
