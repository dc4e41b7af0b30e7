"""Room for what a pass computes in between, so that no layer of a step allocates or makes views anew."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenstep.attention import attention_workspace_bytes
from tokenstep.models.config import ModelConfig


class Workspace:
    """Tensors for one pass at a time, used by one layer after the other, and again by the next pass.

    On a CPU. On a GPU there is room for the attention kernel's own alone; the rest is None, as torch's
    products wouldn't use it: their results are new tensors, in a captured graph at fixed addresses too.

    Args:
        config: the model's shape.
        dtype: of hidden states.
        device: where the model is.

    Attributes:
        normed: [T, hidden_size].
        qkv: [T, (num_heads + 2 num_kv_heads) · head_dim].
        attended: [T, num_heads, head_dim].
        gate_up: [T, 2 intermediate_size].
        gated: [T, intermediate_size].
        attention: uint8, the workspace of `paged_attention`, which only a GPU needs.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._dtype = dtype
        self._is_used = device.type == "cpu"
        self._rows = -1
        self._heads: tuple[Tensor, ...] = ()  # views of qkv
        self._flat: Tensor | None = None  # a view of attended
        self.normed: Tensor | None = None
        self.qkv: Tensor | None = None
        self.attended: Tensor | None = None
        self.gate_up: Tensor | None = None
        self.gated: Tensor | None = None
        self.attention: Tensor | None = None
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self.attention = torch.zeros(attention_workspace_bytes(index), dtype=torch.uint8, device=device)

    def prepare(self, rows: int) -> None:
        """Makes room for T = `rows` tokens."""
        if rows == self._rows or not self._is_used:
            return
        config = self._config

        def room(*shape: int) -> Tensor:
            return torch.empty((rows, *shape), dtype=self._dtype)

        self.normed = room(config.hidden_size)
        self.qkv = room(config.q_size + 2 * config.kv_size)
        self.attended = room(config.num_heads, config.head_dim)
        self.gate_up = room(2 * config.intermediate_size)
        self.gated = room(config.intermediate_size)
        self._heads = self._split(self.qkv)
        self._flat = self.attended.view(rows, config.q_size)
        self._rows = rows

    def heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """q, k and v [T, heads, head_dim], views of the projection `qkv`."""
        return self._heads if qkv is self.qkv else self._split(qkv)

    def flat(self, attended: Tensor) -> Tensor:
        """[T, heads, head_dim] as [T, heads · head_dim]."""
        if self._flat is not None and attended is self.attended:
            return self._flat
        return attended.view(-1, self._config.q_size)

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        config = self._config
        heads = qkv.view(-1, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        return heads.split_with_sizes((config.num_heads, config.num_kv_heads, config.num_kv_heads), 1)
