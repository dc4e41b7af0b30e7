"""The floor of a decode step on a CPU: one read of the model's weights, whatever is computed with them."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tokenstep._native import cpu

READS = 7


def weight_bytes(model: Path) -> int:
    """Bytes of a GGUF file, or of all safetensors in a folder."""
    files = list(model.glob("*.safetensors")) if model.is_dir() else [model]
    return sum(file.stat().st_size for file in files)


def read_seconds(num_bytes: int, threads: int) -> float:
    """Median seconds of reading so many bytes with so many threads, with a maximum so that none is skipped.

    What fits the last-level cache is read from there, as a model of that size would be.
    """
    values = np.ones(max(1, num_bytes // 4), np.float32)
    before = cpu.num_threads()
    cpu.set_num_threads(threads)
    try:
        cpu.testing.read_max(values)  # its pages are there, and the threads awake
        return statistics.median(_once(values) for _ in range(READS))
    finally:
        cpu.set_num_threads(before)


def _once(values: npt.NDArray[np.float32]) -> float:
    begin = time.perf_counter()
    cpu.testing.read_max(values)
    return time.perf_counter() - begin
