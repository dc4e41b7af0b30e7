"""The report of a benchmark on a GPU, with the measurements stood in for."""

import pytest

torch = pytest.importorskip("torch")

from tokenstep.bench import gpu_report  # noqa: E402
from tokenstep.bench.timer import Timing  # noqa: E402


def test_the_floor_is_an_empty_launch_and_the_bytes_at_the_bandwidth_of_a_copy(monkeypatch):
    times = {"tokenstep": Timing(9.0, 8.0, 7), "torch": Timing(20.0, 19.0, 7)}
    monkeypatch.setattr(gpu_report._native, "cuda_unusable_because", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu_report, "measure_floors", lambda budget_s: (2.0, 1000.0))
    monkeypatch.setattr(gpu_report, "time_on_gpu", lambda functions, budget_s: (times, ["torch"]))
    bench = gpu_report.GpuBench("sample", {"vocab_size": 5}, 0.1)
    for batch in (1, 2):
        bench.measure({"batch": batch}, 3000 * batch, {})
    settings = bench.report.settings
    assert (settings["vocab_size"], settings["device"], settings["empty_launch_us"]) == (5, "a GPU", 2.0)
    assert settings["copy_gb_per_s"] == 1.0
    assert settings["timed_with_launches"] == ["torch"]
    assert bench.report.cases() == [
        ({"batch": 1}, {"floor": 5.0, "tokenstep": 9.0, "torch": 20.0}),
        ({"batch": 2}, {"floor": 8.0, "tokenstep": 9.0, "torch": 20.0}),
    ]
