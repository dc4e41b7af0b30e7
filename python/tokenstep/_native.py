"""Loads the compiled modules: ``_C`` always, ``_C_cuda`` where it was built; else says why it is absent."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import numpy as np

from tokenstep import _C as cpu


def _load_cuda() -> tuple[ModuleType | None, str | None]:
    name = "tokenstep._C_cuda"
    if importlib.util.find_spec(name) is None:
        return None, f"tokenstep has no CUDA module here: {cpu.cuda_state}"
    try:
        return importlib.import_module(name), None
    except ImportError as error:  # a broken or mismatched binary; the CPU ops must still work
        return None, f"the CUDA module cannot be loaded: {error}"


def cuda_unusable_because() -> str | None:
    """Why CUDA cannot be used in this process, for an error message; None if it can."""
    if cuda is None:
        return cuda_absent_because
    reason: str | None = cuda.unusable_because()
    return None if reason is None else f"the CUDA module cannot be used here: {reason}"


def module_for(array: Any) -> Any:
    """The compiled module of an array's device; that of the CPU says what is wrong with others."""
    if cuda is None or isinstance(array, np.ndarray):
        return cpu
    on_gpu = getattr(array, "is_cuda", None)  # of torch, in tens of nanoseconds
    if on_gpu is None:
        on_gpu = device_type(array) == CUDA
    return cuda if on_gpu else cpu


def device_type(array: Any) -> int | None:
    """DLPack's number for the device of an array."""
    try:
        return int(array.__dlpack_device__()[0])
    except Exception:  # no array at all, or none with memory: the op's own error says so
        return None


CUDA = 2  # DLPack's device type
cuda: ModuleType | None
cuda_absent_because: str | None
cuda, cuda_absent_because = _load_cuda()

__all__ = [
    "CUDA",
    "cpu",
    "cuda",
    "cuda_absent_because",
    "cuda_unusable_because",
    "device_type",
    "module_for",
]
