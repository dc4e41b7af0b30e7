"""Results as arrays of the library that the arguments came from."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import numpy as np

__all__ = ["as_given"]

_R = TypeVar("_R")


def as_given(argument: Any, result: _R) -> _R:
    """New arrays as arrays of the argument's library, without a copy where that library can.

    The native modules give arrays of torch and CuPy themselves, and NumPy's for all others.

    Args:
        argument: An array.
        result: An array, or a tuple whose first field is one and whose others are arrays or None.

    Returns:
        The result with its NumPy arrays replaced, if the argument is of another library. JAX has no int64
        unless its ``jax_enable_x64`` is set: there such results come as int32.
    """
    first = result[0] if isinstance(result, tuple) else result
    if type(first) is not np.ndarray or isinstance(argument, np.ndarray):
        return result
    namespace = getattr(argument, "__array_namespace__", None)
    library: Any = namespace() if namespace else sys.modules[type(argument).__module__.partition(".")[0]]
    if not isinstance(result, tuple):
        converted: _R = library.from_dlpack(result)
        return converted
    fields = [None if field is None else library.from_dlpack(field) for field in result]
    make: Any = getattr(result, "_make", tuple)  # a named tuple has its own
    again: _R = make(fields)
    return again
