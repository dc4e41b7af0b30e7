"""From named tensors to a decoder: fuses q, k, v and gate, up, and brings each to its place once.

All tensors are checked against the file's table and laid out first. Then a few threads fill the matrices:
those that stay as they are with the file's bytes, the others with numbers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tokenstep.models.config import ModelConfig
from tokenstep.models.decoder import DecoderModel, Layer
from tokenstep.models.errors import ModelFileError
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
    """
    builder = _Builder(config, source, dtype, device, keep_quantised)
    model = builder.lay_out()
    if unexpected := sorted(source.unexpected()):
        some = ", ".join(unexpected[:4]) + (", …" if len(unexpected) > 4 else "")
        raise ModelFileError(
            f"tokenstep.load: {source.source}: {len(unexpected)} tensors have no place in a"
            f" {config.family} model: {some}"
        )
    builder.fill(progress)
    return model


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
        self._pages = HugePages()
        self._reads: list[_Read] = []

    def lay_out(self) -> DecoderModel:
        """The model with its norms read and its matrices unfilled."""
        config = self.config
        embedding = self._matrix(["embedding"], [config.vocab_size], config.hidden_size)
        head = embedding
        if not config.tie_embeddings:
            head = self._matrix(["head"], [config.vocab_size], config.hidden_size)
        layers = [self._layer(index) for index in range(config.num_layers)]
        final_norm = self._norm("final_norm")
        rope = build_rope(config.rope, config.head_dim, config.max_position, self.device)
        return DecoderModel(config, embedding, layers, final_norm, _projection(head, None), rope)

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
        hidden, inner = config.hidden_size, config.intermediate_size
        qkv_rows = [config.q_size, config.kv_size, config.kv_size]
        return Layer(
            attention_norm=self._norm(at + "attention_norm"),
            qkv=self._linear(at, ["q", "k", "v"], qkv_rows, hidden, config.qkv_bias),
            output=self._linear(at, ["output"], [hidden], config.q_size, config.o_bias),
            mlp_norm=self._norm(at + "mlp_norm"),
            gate_up=self._linear(at, ["gate", "up"], [inner, inner], hidden, config.mlp_bias),
            down=self._linear(at, ["down"], [hidden], inner, config.mlp_bias),
            window=config.sliding_window(index),
            head_norm=self._head_norm(at) if config.qk_norm else None,
            post_attention_norm=self._norm(at + "post_attention_norm") if config.post_norms else None,
            post_mlp_norm=self._norm(at + "post_mlp_norm") if config.post_norms else None,
        )

    def _linear(self, at: str, names: list[str], rows: list[int], columns: int, bias: bool) -> Projection:
        weight = self._matrix([at + name for name in names], rows, columns)
        biases = [f"{at}{name}.bias" for name in names]
        return _projection(weight, self._tensor(biases, [(count,) for count in rows]) if bias else None)

    def _matrix(self, names: list[str], rows: list[int], columns: int) -> Tensor | PackedWeight:
        """Room for matrices, one under the other, each to be read into its part."""
        shapes = [(count, columns) for count in rows]
        for name, shape in zip(names, shapes, strict=True):
            self.source.expect(name, shape)
        forms = {self.source.form(name) if self.keep_quantised else None for name in names}
        form = form_of(forms, columns, self.dtype, self.device)
        if form is None:
            return self._tensor(names, shapes)
        weight = PackedWeight(form, sum(rows), columns, self.dtype, self._pages)
        first_row = 0
        for name, shape in zip(names, shapes, strict=True):
            pack = self._pack if form in forms else self._pack_numbers
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
        for name, shape in zip(names, shapes, strict=True):
            self.source.expect(name, shape)
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
        self.source.expect(name, (size,))
        weight = torch.empty(size, dtype=torch.float32, device=self.device)
        self.source.read_into(name, weight)
        return weight


def _projection(weight: Tensor | PackedWeight, bias: Tensor | None) -> Projection:
    return PackedLinear(weight, bias) if isinstance(weight, PackedWeight) else Linear(weight, bias)
