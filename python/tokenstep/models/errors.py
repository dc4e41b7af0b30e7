"""What can be wrong with a model's files; every message names the file and the field."""

from __future__ import annotations


class ModelFileError(ValueError):
    """A file is damaged, truncated or lacks something that a complete model has."""


class UnsupportedConfig(ValueError):
    """The files are sound but ask for something that tokenstep doesn't compute."""


class ModelNotFound(FileNotFoundError):
    """There is no model under the given name or path."""
