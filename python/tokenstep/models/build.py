"""From named tensors to a decoder: fuses q, k, v and gate, up, and converts each to its place once.

All tensors are checked against the file's table and laid out first. Then a few threads fill the matrices,
since decoding a quantised tensor is work for one core.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from tokenstep.models.config import ModelConfig
from tokenstep.models.decoder import DecoderModel, Layer
from tokenstep.models.errors import ModelFileError
from tokenstep.models.layers import HeadNorm, Linear, RMSNorm
from tokenstep.models.rope import build_rope


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

    def unexpected(self) -> Iterable[str]:
        """The file's own names of the tensors that nobody has expected."""
        ...


def build_model(
    config: ModelConfig,
    source: TensorSource,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool = False,
) -> DecoderModel:
    """The model with its weights from `source` in `dtype` on `device`, with a bar on stderr if `progress`.

    Raises ModelFileError for missing, left-over and misshapen tensors.
    """
    builder = _Builder(config, source, dtype, device)
    model = builder.lay_out()
    if unexpected := sorted(source.unexpected()):
        some = ", ".join(unexpected[:4]) + (", …" if len(unexpected) > 4 else "")
        raise ModelFileError(
            f"tokenstep.load: {source.source}: {len(unexpected)} tensors have no place in a"
            f" {config.family} model: {some}"
        )
    builder.fill(progress)
    return model


class _Builder:
    def __init__(
        self, config: ModelConfig, source: TensorSource, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config = config
        self.source = source
        self.dtype = dtype
        self.device = device
        self._places: list[tuple[str, Tensor]] = []  # what is yet to be read

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
        return DecoderModel(config, embedding, layers, final_norm, Linear(head), rope)

    def fill(self, progress: bool) -> None:
        """Reads all matrices into their places; raises what a read has raised."""
        bar = tqdm(
            total=sum(place.numel() for _, place in self._places),
            unit=" weights",
            unit_scale=True,
            desc="loading",
            leave=False,
            file=sys.stderr,
            disable=not progress,
        )
        with bar, ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            reads = {
                pool.submit(self.source.read_into, name, place): place.numel() for name, place in self._places
            }
            try:
                for read in as_completed(reads):
                    read.result()
                    bar.update(reads[read])
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

    def _linear(self, at: str, names: list[str], rows: list[int], columns: int, bias: bool) -> Linear:
        weight = self._matrix([at + name for name in names], rows, columns)
        return Linear(weight, self._vector([f"{at}{name}.bias" for name in names], rows) if bias else None)

    def _matrix(self, names: list[str], rows: list[int], columns: int) -> Tensor:
        return self._place(names, [(count, columns) for count in rows])

    def _vector(self, names: list[str], sizes: list[int]) -> Tensor:
        return self._place(names, [(size,) for size in sizes])

    def _place(self, names: list[str], shapes: list[tuple[int, ...]]) -> Tensor:
        """Room for tensors of these shapes, one under the other, each to be read into its part."""
        for name, shape in zip(names, shapes, strict=True):
            self.source.expect(name, shape)
        rows = [shape[0] for shape in shapes]
        target = torch.empty((sum(rows), *shapes[0][1:]), dtype=self.dtype, device=self.device)
        self._places.extend(zip(names, torch.split(target, rows), strict=True))
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
