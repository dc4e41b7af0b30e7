"""Which device an LLM takes, and what it says where there is no such GPU."""

from __future__ import annotations

import pytest
import torch

from tokenstep import _native
from tokenstep.llm import choose_device
from tokenstep.models.load import choose_dtype, dtype_of_capability

HAS_GPU = torch.cuda.is_available() and _native.cuda_unusable_because() is None


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with two; the second one is torch's current, and too old."""
    monkeypatch.setattr(_native, "cuda_unusable_because", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None: (7, 5) if d == 1 else (9, 0))


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_an_error_with_the_reason() -> None:
    assert choose_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:1", torch.device("cuda")):
        with pytest.raises(RuntimeError, match=r"device = 'cuda(:1)?', but (tokenstep has|the CUDA module)"):
            choose_device(name)


def test_a_torch_without_gpus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "cuda_unusable_because", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(RuntimeError, match="device = 'cuda', but torch finds no GPU here"):
        choose_device("cuda")


def test_a_gpu_is_named_with_its_number(two_gpus: None) -> None:
    for name in ("auto", "cuda", "cuda:0"):
        assert choose_device(name) == torch.device("cuda:0")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cuda:2", r"this machine has 2 GPUs, numbered from 0"),
        ("cuda:1", r"that GPU has compute capability 7\.5; the kernels need 8\.0"),
    ],
)
def test_a_gpu_that_is_not_there_or_too_old_is_refused(two_gpus: None, name: str, why: str) -> None:
    with pytest.raises(RuntimeError, match=f"device = '{name}', but {why}"):
        choose_device(name)


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cpu:", "cuda:-1", ""])
def test_a_name_of_no_device_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"device = '{name}', expected 'auto', 'cpu' or 'cuda'"):
        choose_device(name)


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")]
)
def test_auto_is_what_the_gpus_tensor_cores_multiply(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dtype_of_capability(capability) == getattr(torch, expected)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_dtype("auto", torch.device("cuda:0")) == getattr(torch, expected)
    assert choose_dtype("float32", torch.device("cuda:0")) == torch.float32
