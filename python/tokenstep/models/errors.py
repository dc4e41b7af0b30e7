"""What can be wrong with a model's files or memory; messages name file and field, or have the numbers."""

from __future__ import annotations


class ModelFileError(ValueError):
    """A file is damaged, truncated or lacks something that a complete model has."""


class UnsupportedConfig(ValueError):
    """The files are sound but ask for something that tokenstep doesn't compute."""


class ModelNotFound(FileNotFoundError):
    """There is no model under the given name or path."""


class NotEnoughMemory(MemoryError):
    """A device has no room for the model's weights or its KV cache; the message has the numbers."""


def gigabytes(count: int) -> str:
    """Bytes for a message, in units of 10⁹ or, below a tenth of that, 10⁶."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
