"""From named tensors to a decoder: fuses q, k, v and gate, up, and converts each to its place once.

Matrices are laid out first and filled by a few threads, since decoding a quantised tensor is work for one
core.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
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

    def read_into(self, name: str, target: Tensor) -> None:
        """Writes the tensor into `target`, in its dtype; ModelFileError if absent or of another shape."""
        ...

    def unread(self) -> Iterable[str]:
        """The file's own names of the tensors that nobody has asked for."""
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
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        try:
            return _Builder(config, source, dtype, device, pool).build(progress)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Builder:
    def __init__(
        self,
        config: ModelConfig,
        source: TensorSource,
        dtype: torch.dtype,
        device: torch.device,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.config = config
        self.source = source
        self.dtype = dtype
        self.device = device
        self._pool = pool
        self._reads: dict[Future[None], int] = {}  # with the number of weights of each

    def build(self, progress: bool) -> DecoderModel:
        config = self.config
        embedding = self._matrix(["embedding"], [config.vocab_size], config.hidden_size)
        head = embedding
        if not config.tie_embeddings:
            head = self._matrix(["head"], [config.vocab_size], config.hidden_size)
        layers = [self._layer(index) for index in range(config.num_layers)]
        final_norm = self._norm("final_norm")
        self._wait(progress)
        if unread := sorted(self.source.unread()):
            shown = ", ".join(unread[:4]) + (", …" if len(unread) > 4 else "")
            raise ModelFileError(
                f"tokenstep.load: {self.source.source}: {len(unread)} tensors have no place in a"
                f" {config.family} model: {shown}"
            )
        rope = build_rope(config.rope, config.head_dim, config.max_position, self.device)
        return DecoderModel(config, embedding, layers, final_norm, Linear(head), rope)

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
        target = torch.empty((sum(rows), columns), dtype=self.dtype, device=self.device)
        self._fill(names, rows, target)
        return target

    def _vector(self, names: list[str], sizes: list[int]) -> Tensor:
        target = torch.empty(sum(sizes), dtype=self.dtype, device=self.device)
        self._fill(names, sizes, target)
        return target

    def _fill(self, names: list[str], rows: list[int], target: Tensor) -> None:
        for name, part in zip(names, target.split(rows), strict=True):
            self._reads[self._pool.submit(self.source.read_into, name, part)] = part.numel()

    def _wait(self, progress: bool) -> None:
        """Until all matrices are filled; raises what a read has raised."""
        total = sum(self._reads.values())
        with tqdm(
            total=total,
            unit=" weights",
            unit_scale=True,
            desc="loading",
            leave=False,
            file=sys.stderr,
            disable=not progress,
        ) as bar:
            for read in as_completed(self._reads):
                read.result()
                bar.update(self._reads[read])

    def _norm(self, name: str) -> RMSNorm:
        weight = torch.empty(self.config.hidden_size, dtype=torch.float32, device=self.device)
        self.source.read_into(name, weight)
        return RMSNorm(weight, self.config.rms_norm_eps, self.dtype)

    def _head_norm(self, at: str) -> HeadNorm:
        config = self.config
        q, k = torch.empty((2, config.head_dim), dtype=torch.float32, device=self.device)
        self.source.read_into(at + "q_norm", q)
        self.source.read_into(at + "k_norm", k)
        weight = torch.cat([q.expand(config.num_heads, -1), k.expand(config.num_kv_heads, -1)])
        return HeadNorm(weight, config.rms_norm_eps)
