"""What the benchmarks on a GPU share: floors measured in the same run, and a report of cases beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenstep import _native
from tokenstep.bench.gpu_timer import measure_floors, time_on_gpu
from tokenstep.bench.report import FLOOR, Report
from tokenstep.bench.timer import Timing


class GpuBench:
    """Measures cases in microseconds of GPU time. The floor is an empty launch, and a large copy's bandwidth.

    Attributes:
        report: what has been measured.

    Args:
        bench: the benchmark's name.
        settings: beside which the device and the floors are kept.
        budget_s: how long each case, and the floors, are measured.

    Raises:
        RuntimeError: there is no GPU, or no CUDA module.
    """

    def __init__(self, bench: str, settings: Mapping[str, Any], budget_s: float) -> None:
        if (reason := _native.cuda_unusable_because()) is not None:
            raise RuntimeError(f"tokenstep bench: {reason}")
        import torch

        self._budget_s = budget_s
        self._empty_us, self._bytes_per_us = measure_floors(budget_s)
        self.report = Report(
            bench,
            {
                **settings,
                "device": torch.cuda.get_device_name(),
                "empty_launch_us": round(self._empty_us, 2),
                "copy_gb_per_s": round(self._bytes_per_us / 1e3, 1),
                "timed_with_launches": [],
            },
        )

    def measure(
        self, case: Mapping[str, Any], moved_bytes: int, functions: Mapping[str, Callable[[], object]]
    ) -> None:
        """Times `functions` on inputs of which `moved_bytes` must be moved."""
        floor = self._empty_us + moved_bytes / self._bytes_per_us
        self.report.add({**case, "impl": FLOOR}, Timing(floor, floor, 1))
        times, uncaptured = time_on_gpu(functions, budget_s=self._budget_s)
        for impl, timing in times.items():
            self.report.add({**case, "impl": impl}, timing)
        kept = self.report.settings["timed_with_launches"]
        kept.extend(name for name in uncaptured if name not in kept)
