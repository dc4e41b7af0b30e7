"""Reads a GGUF file: metadata, the table of tensors, and their data as views of the mapped file.

A parser of our own because the gguf package makes an array of every string of the vocabulary, which takes
seconds; this one takes a tenth. Layout: magic, version, counts, metadata, tensor table, padding, data, all
little-endian. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tokenstep.models.errors import ModelFileError, UnsupportedConfig
from tokenstep.models.ggml_types import GgmlType, ggml_type

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "<u1", 10: "<u8", 11: "<i8",
    12: "<f8",
}  # fmt: skip
_SMALLEST = {**{kind: np.dtype(code).itemsize for kind, code in _SCALARS.items()}, _STRING: 8, _ARRAY: 12}


@dataclass(frozen=True)
class GgufTensor:
    """An entry of the table. `shape` is row-major ([out, in] for a matrix), `start` an offset in the file."""

    name: str
    shape: tuple[int, ...]
    kind: GgmlType
    start: int
    num_bytes: int


class GgufFile:
    """An open GGUF file.

    Attributes:
        path: the file.
        metadata: every key with its value: Python's numbers, booleans and strings; arrays of numbers are
            NumPy views of the file, other arrays lists.
        tensors: by name, in the file's order.

    Raises:
        ModelFileError: the file is no GGUF, truncated or damaged.
        UnsupportedConfig: a version, byte order or tensor type that can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise ModelFileError(f"tokenstep.load: {path.name}: {size} bytes are too few for a GGUF file")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._size = size
        self._at = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        num_tensors, num_keys = self._read_start()
        for _ in range(num_keys):
            self._read_key()
        self._read_table(num_tensors)

    def raw(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        """The tensor's bytes, [rows, bytes of a row], a view of the file."""
        flat = np.frombuffer(self._data, np.uint8, tensor.num_bytes, tensor.start)
        return flat.reshape(-1, tensor.kind.row_bytes(tensor.shape[-1]))

    def release(self, tensor: GgufTensor) -> None:
        """Takes the tensor's pages out of the process; what is read again comes from the file anew."""
        page = mmap.PAGESIZE
        first, end = tensor.start // page * page, -(-(tensor.start + tensor.num_bytes) // page) * page
        self._data.madvise(mmap.MADV_DONTNEED, first, min(end, len(self._data)) - first)

    def header(self) -> memoryview:
        """All bytes before the data."""
        return memoryview(self._data)[: self._at]

    def bytes_at(self, start: int, count: int) -> bytes:
        """Bytes of the file, fewer at its end."""
        return self._data[start : start + count]

    def _bad(self, what: str) -> NoReturn:
        raise ModelFileError(f"tokenstep.load: {self.path.name}: {what} (is the file complete?)")

    def _skip(self, count: int) -> int:
        """Goes on by `count` bytes; returns where they begin."""
        start = self._at
        if start + count > self._size:
            self._bad(f"{count} bytes expected at {start}, but the file has {self._size} in all")
        self._at = start + count
        return start

    def _take(self, count: int) -> bytes:
        start = self._skip(count)
        return self._data[start : start + count]

    def _number(self, code: str) -> int:
        value: int = struct.unpack_from(code, self._data, self._skip(struct.calcsize(code)))[0]
        return value

    def _string(self) -> str:
        start = self._at
        try:
            return self._take(self._number("<Q")).decode()
        except UnicodeDecodeError:
            self._bad(f"the string at {start} is not UTF-8")

    def _read_start(self) -> tuple[int, int]:
        if (magic := self._take(4)) != MAGIC:
            raise ModelFileError(
                f"tokenstep.load: {self.path.name}: starts with {magic!r}, a GGUF file with {MAGIC!r}"
            )
        version = self._number("<I")
        if version not in VERSIONS:
            if version and version & 0xFFFF == 0:
                raise UnsupportedConfig(
                    f"tokenstep.load: {self.path.name}: big-endian GGUF, expected little-endian"
                )
            raise UnsupportedConfig(
                f"tokenstep.load: {self.path.name}: GGUF version {version}, expected 2 or 3"
            )
        return self._number("<Q"), self._number("<Q")

    def _read_key(self) -> None:
        key = self._string()
        if key in self.metadata:
            self._bad(f"the key {key!r} occurs twice")
        self.metadata[key] = self._value(key, self._number("<I"))

    def _value(self, key: str, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._numbers(kind, 1)[0].item()
        if kind != _ARRAY:
            self._bad(f"{key}: value type {kind} is unknown")
        if depth > 3:
            self._bad(f"{key}: arrays nested too deep")
        item, count = self._number("<I"), self._number("<Q")
        if count * _SMALLEST.get(item, 1) > self._size - self._at:
            self._bad(f"{key}: {count} values don't fit into the file")
        if item == _STRING:
            return self._strings(key, count)
        if item in _SCALARS:
            return self._numbers(item, count)
        return [self._value(key, item, depth + 1) for _ in range(count)]

    def _numbers(self, kind: int, count: int) -> NDArray[Any]:
        dtype = np.dtype(_SCALARS[kind])
        start = self._skip(count * dtype.itemsize)
        values = np.frombuffer(self._data, dtype, count, start)
        return values != 0 if kind == _BOOL else values

    def _strings(self, key: str, count: int) -> list[str]:
        """The long loop of a load (100,000 turns for a vocabulary), so written out flat."""
        data, at, size = self._data, self._at, self._size
        length_of = struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                end = at + 8 + length_of(data, at)[0]
                if end > size:
                    self._bad(f"{key}: a string of {end - at - 8} bytes at {at} reaches over the end")
                strings.append(data[at + 8 : end].decode())
                at = end
        except struct.error:
            self._bad(f"{key}: ends within its {count} strings")
        except UnicodeDecodeError:
            self._bad(f"{key}: the string at {at} is not UTF-8")
        self._at = at
        return strings

    def _read_table(self, num_tensors: int) -> None:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            self._bad(f"general.alignment = {alignment!r}, expected a multiple of 8")
        entries = []
        for _ in range(num_tensors):
            name, num_dims = self._string(), self._number("<I")
            if not 1 <= num_dims <= MAX_DIMS:
                self._bad(f"tensor {name!r} has {num_dims} dimensions, expected 1 to {MAX_DIMS}")
            shape = tuple(self._number("<Q") for _ in range(num_dims))[::-1]
            entries.append((name, shape, self._number("<I"), self._number("<Q")))
        base = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in entries:
            if name in self.tensors:
                self._bad(f"the tensor {name!r} occurs twice")
            self.tensors[name] = self._tensor(name, shape, kind, base + offset, alignment)

    def _tensor(
        self, name: str, shape: tuple[int, ...], number: int, start: int, alignment: int
    ) -> GgufTensor:
        kind = ggml_type(number)
        if kind is None:
            raise UnsupportedConfig(
                f"tokenstep.load: {self.path.name}: tensor {name!r} has ggml type {number}, which the"
                " installed gguf package doesn't know"
            )
        if 0 in shape or shape[-1] % kind.block:
            self._bad(
                f"tensor {name!r} has shape {list(shape)}, expected rows in {kind.name} blocks of"
                f" {kind.block}"
            )
        num_bytes = math.prod(shape[:-1]) * kind.row_bytes(shape[-1])
        if start % alignment or start + num_bytes > self._size:
            self._bad(
                f"tensor {name!r} needs bytes {start} to {start + num_bytes}, the file has {self._size}"
            )
        return GgufTensor(name, shape, kind, start, num_bytes)
