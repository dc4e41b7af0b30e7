"""From named tensors to a decoder: fuses q, k, v and gate, up, and brings each to its place once.

All tensors are checked against the file's table first, and their sizes against the device's memory. Then
they are laid out, and a few threads fill the matrices: those that stay as they are with the file's bytes, the
others with numbers. Each reads a tensor at a time, so that a GPU's model never lies in the host's memory as a
whole.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tokenstep.models.config import ModelConfig
from tokenstep.models.decoder import DecoderModel, Layer
from tokenstep.models.errors import ModelFileError, NotEnoughMemory, gigabytes
from tokenstep.models.free_memory import free_bytes
from tokenstep.models.kv_cache import KVScales
from tokenstep.models.layers import HeadNorm, Linear, Projection, RMSNorm
from tokenstep.models.memory import HugePages
from tokenstep.models.packed_linear import PackedLinear, PackedWeight, form_of
from tokenstep.models.rope import build_rope

PACKED_AT_ONCE = 2 << 20  # bytes of the file that are in memory beside what they become


class TensorSource(Protocol):
    """A file or folder of weights under our names.

    The names: `embedding`, `final_norm`, `head`, and in layer i `layers.i.` with `attention_norm`, `q`, `k`,
    `v`, `output`, `q_norm`, `k_norm`, `post_attention_norm`, `mlp_norm`, `gate`, `up`, `down`,
    `post_mlp_norm`; a bias is `layers.i.q.bias`.
    """

    source: str

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Checks from the file's table, without reading, that a tensor can be read.

        Raises ModelFileError if it is absent or of another shape, UnsupportedConfig for a dtype that we don't
        have.
        """
        ...

    def read_into(self, name: str, target: Tensor) -> None:
        """Writes an expected tensor into `target`, in its dtype. Several threads may read at once."""
        ...

    def form(self, name: str) -> str | None:
        """What an expected matrix is in the file: a form that `PackedWeight` takes, or None for another."""
        ...

    def raw(self, name: str) -> NDArray[Any]:
        """The bytes of an expected matrix that has a form: uint8 [rows, bytes of a row]."""
        ...

    def release(self, name: str) -> None:
        """What memory holds of the tensor's bytes may go; they can be read again."""
        ...

    def kv_scales(self, config: ModelConfig, device: torch.device) -> KVScales | None:
        """The scales of a float8_e4m3 cache that came with the weights; None where none did.

        Raises ModelFileError if some are missing or misshapen.
        """
        ...

    def unexpected(self) -> Iterable[str]:
        """The file's own names of the tensors that nobody has expected."""
        ...


def build_model(
    config: ModelConfig,
    source: TensorSource,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool = False,
    keep_quantised: bool = True,
) -> DecoderModel:
    """The model with its weights from `source`.

    Args:
        config: the model's shape.
        source: the weights.
        dtype: what the model computes in.
        device: where it is.
        progress: show a bar on stderr.
        keep_quantised: matrices that our kernel multiplies as they are stored stay so.

    Raises:
        ModelFileError: a tensor is missing, left over or misshapen.
        NotEnoughMemory: the device has less room than the weights need; nothing has been read then.
    """
    builder = _Builder(config, source, dtype, device, keep_quantised)
    num_bytes = builder.check()
    if unexpected := sorted(source.unexpected()):
        some = ", ".join(unexpected[:4]) + (", …" if len(unexpected) > 4 else "")
        raise ModelFileError(
            f"tokenstep.load: {source.source}: {len(unexpected)} tensors have no place in a"
            f" {config.family} model: {some}"
        )
    free = free_bytes(device, with_swap=True)
    if free is not None and num_bytes > free:
        raise NotEnoughMemory(
            f"tokenstep.load: {source.source}: the weights take {gigabytes(num_bytes)}, of which {device} has"
            f" {gigabytes(free)} free: expected {_remedy(dtype, device, keep_quantised)}"
        )
    model = builder.lay_out()
    builder.fill(progress)
    return model


def _remedy(dtype: torch.dtype, device: torch.device, keep_quantised: bool) -> str:
    """What would take less memory."""
    ways = ["a smaller model"]
    if device.type == "cpu":
        ways.append(
            "a GGUF file in Q4_0" if keep_quantised else "weights='auto', which keeps GGUF's matrices"
        )
    if dtype == torch.float32:
        ways.append("dtype='bfloat16', which halves this")
    return " or ".join(ways)


class _Matrix(NamedTuple):
    """A matrix of the decoder: matrices of the file [rows, columns], one under the other."""

    names: list[str]
    rows: list[int]
    columns: int
    has_bias: bool = False

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of the file's matrices."""
        return [(count, self.columns) for count in self.rows]

    @property
    def biases(self) -> list[str]:
        """The names of their biases."""
        return [f"{name}.bias" for name in self.names] if self.has_bias else []


def _matrices(config: ModelConfig) -> dict[str, _Matrix]:
    """All matrices by their names in the decoder."""
    hidden, inner = config.hidden_size, config.intermediate_size
    found = {"embedding": _Matrix(["embedding"], [config.vocab_size], hidden)}
    if not config.tie_embeddings:
        found["head"] = _Matrix(["head"], [config.vocab_size], hidden)
    for index in range(config.num_layers):
        at = f"layers.{index}."
        qkv, gate_up = [at + name for name in "qkv"], [at + "gate", at + "up"]
        qkv_rows = [config.q_size, config.kv_size, config.kv_size]
        found |= {
            at + "qkv": _Matrix(qkv, qkv_rows, hidden, config.qkv_bias),
            at + "output": _Matrix([at + "output"], [hidden], config.q_size, config.o_bias),
            at + "gate_up": _Matrix(gate_up, [inner, inner], hidden, config.mlp_bias),
            at + "down": _Matrix([at + "down"], [hidden], inner, config.mlp_bias),
        }
    return found


def _norms(config: ModelConfig) -> dict[str, int]:
    """The sizes of all norm weights by name."""
    found = {"final_norm": config.hidden_size}
    for index in range(config.num_layers):
        at = f"layers.{index}."
        names = ["attention_norm", "mlp_norm"]
        if config.post_norms:
            names += ["post_attention_norm", "post_mlp_norm"]
        found |= {at + name: config.hidden_size for name in names}
        if config.qk_norm:
            found |= {at + name: config.head_dim for name in ("q_norm", "k_norm")}
    return found


@dataclass
class _Read:
    """What is yet to be read: a tensor of `size` numbers, by calling `run`."""

    size: int
    run: Callable[[], None]


class _Builder:
    def __init__(
        self,
        config: ModelConfig,
        source: TensorSource,
        dtype: torch.dtype,
        device: torch.device,
        keep_quantised: bool,
    ) -> None:
        self.config = config
        self.source = source
        self.dtype = dtype
        self.device = device
        self.keep_quantised = keep_quantised
        self._matrices = _matrices(config)
        self._pages = HugePages()
        self._reads: list[_Read] = []

    def check(self) -> int:
        """Checks all tensors against the file's table; returns the bytes that the model will take."""
        config, total = self.config, 0
        for matrix in self._matrices.values():
            for name, shape in zip(matrix.names, matrix.shapes, strict=True):
                self.source.expect(name, shape)
            for name, count in zip(matrix.biases, matrix.rows if matrix.has_bias else (), strict=True):
                self.source.expect(name, (count,))
            rows, form = sum(matrix.rows), self._form(matrix)
            if form is None:
                total += rows * matrix.columns * self.dtype.itemsize
            else:
                total += PackedWeight.num_bytes_of(form, rows, matrix.columns)
            total += rows * self.dtype.itemsize if matrix.has_bias else 0
        for name, size in _norms(config).items():
            self.source.expect(name, (size,))
        return total + config.max_position * config.head_dim * torch.float32.itemsize

    def lay_out(self) -> DecoderModel:
        """The model with its norms read and its matrices unfilled."""
        config = self.config
        embedding = self._matrix(self._matrices["embedding"])
        head = embedding if config.tie_embeddings else self._matrix(self._matrices["head"])
        layers = [self._layer(index) for index in range(config.num_layers)]
        final_norm = self._norm("final_norm")
        rope = build_rope(config.rope, config.head_dim, config.max_position, self.device)
        return DecoderModel(
            config,
            embedding,
            layers,
            final_norm,
            _projection(head, None),
            rope,
            kv_scales=self.source.kv_scales(config, self.device),
        )

    def fill(self, progress: bool) -> None:
        """Reads all matrices into their places; raises what a read has raised."""
        bar = tqdm(
            total=sum(read.size for read in self._reads),
            unit=" weights",
            unit_scale=True,
            desc="loading",
            leave=False,
            file=sys.stderr,
            disable=not progress,
        )
        with bar, ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            sizes = {pool.submit(read.run): read.size for read in self._reads}
            try:
                for done in as_completed(sizes):
                    done.result()
                    bar.update(sizes[done])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _layer(self, index: int) -> Layer:
        config, at = self.config, f"layers.{index}."
        return Layer(
            attention_norm=self._norm(at + "attention_norm"),
            qkv=self._linear(at + "qkv"),
            output=self._linear(at + "output"),
            mlp_norm=self._norm(at + "mlp_norm"),
            gate_up=self._linear(at + "gate_up"),
            down=self._linear(at + "down"),
            window=config.sliding_window(index),
            head_norm=self._head_norm(at) if config.qk_norm else None,
            post_attention_norm=self._norm(at + "post_attention_norm") if config.post_norms else None,
            post_mlp_norm=self._norm(at + "post_mlp_norm") if config.post_norms else None,
        )

    def _linear(self, name: str) -> Projection:
        matrix = self._matrices[name]
        bias = self._tensor(matrix.biases, [(count,) for count in matrix.rows]) if matrix.has_bias else None
        return _projection(self._matrix(matrix), bias)

    def _form(self, matrix: _Matrix) -> str | None:
        """How the matrix is packed; None: it becomes a tensor."""
        return form_of(self._file_forms(matrix), matrix.columns, self.dtype, self.device)

    def _file_forms(self, matrix: _Matrix) -> set[str | None]:
        """The forms of its parts in the file, None for one that may not or cannot stay as it is."""
        return {self.source.form(name) if self.keep_quantised else None for name in matrix.names}

    def _matrix(self, matrix: _Matrix) -> Tensor | PackedWeight:
        """Room for the file's matrices, each to be read into its part."""
        form = self._form(matrix)
        if form is None:
            return self._tensor(matrix.names, matrix.shapes)
        weight = PackedWeight(form, sum(matrix.rows), matrix.columns, self.dtype, self._pages)
        pack = self._pack if form in self._file_forms(matrix) else self._pack_numbers
        first_row = 0
        for name, shape in zip(matrix.names, matrix.shapes, strict=True):
            self._reads.append(_Read(math.prod(shape), partial(pack, name, shape, weight, first_row)))
            first_row += shape[0]
        return weight

    def _pack(self, name: str, shape: tuple[int, int], weight: PackedWeight, first_row: int) -> None:
        raw = self.source.raw(name)
        step = max(1, PACKED_AT_ONCE // raw.shape[1])
        for start in range(0, shape[0], step):
            weight.pack(raw[start : start + step], first_row + start)
            self.source.release(name)

    def _pack_numbers(self, name: str, shape: tuple[int, int], weight: PackedWeight, first_row: int) -> None:
        numbers = torch.empty(shape, dtype=self.dtype)
        self.source.read_into(name, numbers)
        weight.pack(numbers.view(torch.uint8), first_row)

    def _tensor(self, names: list[str], shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """Room for tensors of these shapes, one under the other, each to be read into its part."""
        rows = [shape[0] for shape in shapes]
        target = torch.empty((sum(rows), *shapes[0][1:]), dtype=self.dtype, device=self.device)
        for name, part in zip(names, torch.split(target, rows), strict=True):
            self._reads.append(_Read(part.numel(), partial(self.source.read_into, name, part)))
        return target

    def _norm(self, name: str) -> RMSNorm:
        weight = self._norm_weight(name, self.config.hidden_size)
        return RMSNorm(weight, self.config.rms_norm_eps, self.dtype)

    def _head_norm(self, at: str) -> HeadNorm:
        config = self.config
        q = self._norm_weight(at + "q_norm", config.head_dim).expand(config.num_heads, -1)
        k = self._norm_weight(at + "k_norm", config.head_dim).expand(config.num_kv_heads, -1)
        return HeadNorm(torch.cat([q, k]), config.rms_norm_eps)

    def _norm_weight(self, name: str, size: int) -> Tensor:
        weight = torch.empty(size, dtype=torch.float32, device=self.device)
        self.source.read_into(name, weight)
        return weight


def _projection(weight: Tensor | PackedWeight, bias: Tensor | None) -> Projection:
    return PackedLinear(weight, bias) if isinstance(weight, PackedWeight) else Linear(weight, bias)
