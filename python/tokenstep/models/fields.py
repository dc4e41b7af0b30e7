"""Typed access to the untyped metadata of a model file, with errors that name the field."""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenstep.models.errors import ModelFileError, UnsupportedConfig

LARGEST = 2**31 - 1  # no size or id in a model is larger; what is comes from a damaged file


class Fields:
    """A mapping of names to values from one file: `config.json`, or a GGUF file's metadata.

    Args:
        values: the names and values.
        source: the file's name, for messages.
        prefix: put before a name that starts with a dot: `.block_count` of a GGUF file is
            `llama.block_count`.
        path: put before every name in messages only, where `values` is a mapping inside the file.
    """

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "", path: str = "") -> None:
        self.values = values
        self.source = source
        self.prefix = prefix
        self.path = path

    def _key(self, name: str) -> str:
        return self.prefix + name if name.startswith(".") else name

    def _where(self, name: str) -> str:
        return f"tokenstep.load: {self.source}: {self.path}{self._key(name)}"

    def get(self, name: str, default: Any = None) -> Any:
        """The value; `default` where it is absent or null."""
        value = self.values.get(self._key(name))
        return default if value is None else value

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.get(name) is not None

    def wrong(self, name: str, expected: str) -> ModelFileError:
        """The error for a value of the wrong type or range."""
        return ModelFileError(f"{self._where(name)} = {shown(self.get(name))}, expected {expected}")

    def unsupported(self, name: str, expected: str) -> UnsupportedConfig:
        """The error for a value that we have no code for."""
        return UnsupportedConfig(f"{self._where(name)} = {shown(self.get(name))}, expected {expected}")

    def _required(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            raise ModelFileError(f"{self._where(name)} is missing")
        return value

    def integer(self, name: str, default: int | None = None, minimum: int = 1, maximum: int = LARGEST) -> int:
        """An integer in minimum … maximum; ModelFileError otherwise, or when absent without a default."""
        value = self._required(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            limit = "" if maximum == LARGEST else f" and ≤ {maximum}"
            raise self.wrong(name, f"an integer ≥ {minimum}{limit}")
        return value

    def number(self, name: str, default: float | None = None, minimum: float = 0.0) -> float:
        """A finite number ≥ `minimum`. Raises ModelFileError otherwise, or when absent without a default."""
        value = self._required(name, default)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not minimum <= value <= sys.float_info.max
        ):
            raise self.wrong(name, f"a number ≥ {minimum:g}")
        return float(value)

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number > 0. Raises ModelFileError otherwise, or when absent without a default."""
        value = self.number(name, default)
        if value == 0:
            raise self.wrong(name, "a number > 0")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        """A boolean. Raises ModelFileError otherwise, or when absent without a default."""
        value = self._required(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string. Raises ModelFileError otherwise, or when absent without a default."""
        value = self._required(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def choice(self, name: str, allowed: Sequence[str], default: str | None = None) -> str:
        """One of `allowed`. Raises UnsupportedConfig for any other string."""
        value = self.text(name, default)
        if value not in allowed:
            raise self.unsupported(name, one_of(allowed))
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """An id or a list of ids; () when absent."""
        value = self.get(name, [])
        ids = value if isinstance(value, list) else [value]
        if any(not isinstance(i, int) or isinstance(i, bool) or not 0 <= i <= LARGEST for i in ids):
            raise self.wrong(name, "a token id or a list of token ids")
        return tuple(ids)

    def strings(self, name: str) -> list[str]:
        """A list of strings. Raises ModelFileError otherwise."""
        value = self._required(name, None)
        if not isinstance(value, list) or set(map(type, value)) - {str}:
            raise self.wrong(name, "a list of strings")
        return value

    def numbers(self, name: str, count: int) -> list[Any]:
        """A GGUF array of `count` numbers, as a list. Raises ModelFileError otherwise."""
        value = self._required(name, None)
        if not isinstance(value, np.ndarray) or value.dtype == bool or np.isnan(value).any():
            raise self.wrong(name, "an array of numbers")
        if len(value) != count:
            raise ModelFileError(f"{self._where(name)} has {len(value)} entries, expected {count}")
        numbers: list[Any] = value.tolist()
        return numbers

    def refuse(self, name: str, why: str) -> None:
        """Raises UnsupportedConfig if the field is there and neither false, zero nor empty."""
        value = self.get(name)
        if value.size if isinstance(value, np.ndarray) else value:
            raise self.unsupported(name, f"it absent ({why})")

    def nested(self, name: str) -> Fields:
        """The mapping under `name`, itself as fields; empty when absent."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Fields(value, self.source, path=f"{self.path}{self._key(name)}.")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelFileError for anything else."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"tokenstep.load: {path}: {error}") from None
    if not isinstance(contents, dict):
        raise ModelFileError(f"tokenstep.load: {path}: expected an object")
    return contents


def one_of(allowed: Sequence[str]) -> str:
    """`one of 'a', 'b'`, for messages."""
    return "one of " + ", ".join(repr(name) for name in allowed)


def shown(value: object) -> str:
    """`value` for a message: its repr, cut where it is long."""
    return _repr.repr(value)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80
