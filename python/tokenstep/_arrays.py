"""Results as arrays of the library that the arguments came from."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["like"]


def like(argument: Any, result: Any) -> Any:
    """A NumPy array as an array of the argument's library, without a copy where that library can.

    JAX has no int64 unless its ``jax_enable_x64`` is set: there such results come as int32.
    """
    namespace = getattr(argument, "__array_namespace__", None)
    library = namespace() if namespace else sys.modules[type(argument).__module__.partition(".")[0]]
    return library.from_dlpack(result)
