"""Garbage collection paused while a command starts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """No search for garbage cycles within.

    Importing torch and reading a vocabulary make hundreds of thousands of objects that stay. Going through
    them again and again takes a seventh of the time to the first token.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
