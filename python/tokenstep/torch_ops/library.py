"""The library of ops: schemas, what they do, and the shapes that they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library: Any = torch.library.Library("tokenstep", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as what an op does, on CPU and CUDA tensors alike."""
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _library.define(schema, **options)
        for key in ("CPU", "CUDA"):
            _library.impl(name, function, key)
        return function

    return register


def shapes_of(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as what an op gives for tensors without data."""
    register: Callable[[Callable[..., Any]], Callable[..., Any]]
    register = torch.library.register_fake(f"tokenstep::{name}", lib=_library)
    return register
