"""The floor of a decode step: one read of the model's weights, whatever is computed with them.

On a CPU by the read itself; on a GPU, and for weights without a file, by the bandwidth of a large copy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenstep._native import cpu

READS = 7
CPU_COPY_BYTES = 128 << 20


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


def measure_copy(device: str) -> dict[str, Any]:
    """Settings of a report: the bandwidth of a large copy, bytes read and written, and the GPU's name."""
    import torch

    if device == "cuda":
        from tokenstep.bench.gpu_timer import measure_floors

        _, bytes_per_us = measure_floors(budget_s=0.5)
        torch.cuda.empty_cache()
        return {"copy_gb_per_s": bytes_per_us / 1e3, "gpu": torch.cuda.get_device_name()}
    source = torch.zeros(CPU_COPY_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(READS):
        begin = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - begin)
    return {"copy_gb_per_s": 2 * CPU_COPY_BYTES / statistics.median(seconds) / 1e9}


def decode_speed(batch: int, context: float, model: Mapping[str, int], gb_per_s: float) -> float:
    """Tokens a second of steps that read the weights once, and each sequence's keys and values.

    Args:
        batch: sequences.
        context: tokens that each has.
        model: `read_bytes`, of the weights a step, and `kv_bytes_per_token`.
        gb_per_s: the bandwidth.
    """
    step = model["read_bytes"] + batch * context * model["kv_bytes_per_token"]
    return batch * gb_per_s * 1e9 / step
