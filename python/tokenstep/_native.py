"""Loads the compiled modules: ``_C`` always, ``_C_cuda`` where it was built; else says why it is absent."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

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


cuda: ModuleType | None
cuda_absent_because: str | None
cuda, cuda_absent_because = _load_cuda()

__all__ = ["cpu", "cuda", "cuda_absent_because", "cuda_unusable_because"]
