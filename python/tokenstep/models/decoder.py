"""The decoder that all families share: pre-norm, grouped-query attention over a paged cache, gated MLP.

A layer is about ten torch calls and one call of `paged_attention`, which rotates, appends and attends. q, k
and v come from one projection, gate and up from another, so that each weight is read in one sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenstep.attention import Rope, paged_attention
from tokenstep.models.config import ModelConfig
from tokenstep.models.layers import Gate, HeadNorm, Projection, RMSNorm, soft_cap
from tokenstep.models.memory import lazy_zeros
from tokenstep.models.packed_linear import PackedWeight, embed
from tokenstep.models.prefill import FreshPrompts, Span
from tokenstep.models.workspace import Workspace

if TYPE_CHECKING:
    from tokenstep.models.lora import AdapterRows


@dataclass
class KVCache:
    """Keys and values by layer: k[i], v[i] are [num_blocks, block_size, num_kv_heads, head_dim]."""

    k: list[Tensor]
    v: list[Tensor]

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """Zeroed blocks for every layer of `config`; on a CPU they take memory only once they are written."""
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)

        def layers() -> list[Tensor]:
            return [lazy_zeros(shape, dtype, device) for _ in range(config.num_layers)]

        return cls(layers(), layers())


@dataclass
class ForwardBatch:
    """One step's tokens of R sequences, packed one sequence behind the other.

    Attributes:
        tokens: int64 [T], ids.
        block_table: int32 [R, max_blocks].
        seq_lens: int32 [R], lengths with the new tokens counted.
        query_start: int32 [R + 1], where each sequence's tokens begin; None where each has one (T = R).
        max_query_len: the most tokens that a sequence has in this step.
        logit_rows: int64 [S], the rows of `tokens` whose hidden states are wanted; None: all.
        adapters: which rows of `tokens` belong to which adapter; None: none to any.
        fresh: the sequences that begin in this step.
    """

    tokens: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start: Tensor | None = None
    max_query_len: int = 1
    logit_rows: Tensor | None = None
    adapters: AdapterRows | None = None
    fresh: Sequence[Span] = ()


@dataclass
class Layer:
    """One layer's weights. The post norms are None but in Gemma-2, head_norm is None but in Qwen3."""

    attention_norm: RMSNorm
    qkv: Projection
    output: Projection
    mlp_norm: RMSNorm
    gate_up: Projection
    down: Projection
    window: int | None
    head_norm: HeadNorm | None = None
    post_attention_norm: RMSNorm | None = None
    post_mlp_norm: RMSNorm | None = None


class DecoderModel:
    """A loaded model, for inference only.

    Args:
        config: the model's shape.
        embedding: [vocab_size, hidden_size], packed or not; its dtype and device are the model's.
        layers: one entry a layer.
        final_norm: the norm before the head.
        head: hidden states to logits.
        rope: the tables for all positions up to `config.max_position`.
        batch_invariant: a token's hidden state and logits have the same bits whatever else is computed in the
            same pass, and however its sequence is cut into passes.

    Attributes:
        uses_sdpa: torch's attention computes long prompts.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor | PackedWeight,
        layers: list[Layer],
        final_norm: RMSNorm,
        head: Projection,
        rope: Rope,
        batch_invariant: bool = False,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.layers = layers
        self.final_norm = final_norm
        self.head = head
        self.rope = rope
        self.batch_invariant = batch_invariant
        self.uses_sdpa = self.device.type == "cuda" and not batch_invariant
        self._gate = Gate(config.activation)
        scale = config.embedding_scale
        # the scale is rounded to the model's dtype before it multiplies: checkpoints were trained so
        self._embedding_scale = None if scale is None else float(torch.tensor(scale, dtype=embedding.dtype))

    def as_batch_invariant(self) -> DecoderModel:
        """The same model, over the same weights, where a row of a product depends on no other row."""
        layers = [
            replace(
                layer,
                qkv=layer.qkv.as_batch_invariant(),
                output=layer.output.as_batch_invariant(),
                gate_up=layer.gate_up.as_batch_invariant(),
                down=layer.down.as_batch_invariant(),
            )
            for layer in self.layers
        ]
        head = self.head.as_batch_invariant()
        return DecoderModel(self.config, self.embedding, layers, self.final_norm, head, self.rope, True)

    @property
    def weight_forms(self) -> tuple[str, ...]:
        """The forms of all projections, sorted: "dense" for tensors, else what our kernel multiplies."""
        layers = ((layer.qkv, layer.output, layer.gate_up, layer.down) for layer in self.layers)
        return tuple(sorted({projection.form for layer in layers for projection in layer} | {self.head.form}))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states, logits and what weights are dense."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: KVCache, room: Workspace | None = None) -> Tensor:
        """Appends the batch's keys and values to `cache`; returns final hidden states [S, hidden_size].

        `room` serves one pass at a time; None: this pass makes its own.
        """
        room = room or Workspace(self.config, self.dtype, self.device)
        room.prepare(len(batch.tokens))
        hidden = embed(batch.tokens, self.embedding)
        if self._embedding_scale is not None:
            hidden = hidden * self._embedding_scale
        fresh = FreshPrompts.of(batch.fresh, batch.seq_lens) if self.uses_sdpa else None
        layers = self.layers if batch.adapters is None else batch.adapters.adapt(self.layers)
        for index, layer in enumerate(layers):
            hidden = self._attention(layer, hidden, batch, fresh, cache.k[index], cache.v[index], room)
            hidden = self._mlp(layer, hidden, room)
        if batch.logit_rows is not None:
            hidden = hidden.index_select(0, batch.logit_rows)
        return self.final_norm(hidden)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [S, hidden_size] to logits [S, vocab_size] in the model's dtype, soft cap applied."""
        logits = self.head(hidden)
        cap = self.config.final_softcap
        return logits if cap is None else soft_cap(logits, cap)

    def _attention(
        self,
        layer: Layer,
        hidden: Tensor,
        batch: ForwardBatch,
        fresh: FreshPrompts | None,
        k_cache: Tensor,
        v_cache: Tensor,
        room: Workspace,
    ) -> Tensor:
        config = self.config
        qkv = layer.qkv(layer.attention_norm(hidden, room.normed), room.qkv)
        q, k, v = room.heads(qkv)
        if layer.head_norm is not None:
            sizes = (config.num_heads, config.num_kv_heads)
            qk = qkv.view(len(qkv), -1, config.head_dim)[:, : sum(sizes)]
            q, k = layer.head_norm(qk).split_with_sizes(sizes, 1)
        attend = paged_attention if fresh is None else fresh.attend
        attended = attend(
            q,
            k_cache,
            v_cache,
            batch.block_table,
            batch.seq_lens,
            k=k,
            v=v,
            rope=self.rope,
            query_start=batch.query_start,
            max_query_len=batch.max_query_len,
            scale=config.attention_scale,
            window=layer.window,
            softcap=config.attention_softcap,
            out=room.attended,
            workspace=room.attention,
        )
        flat = room.flat(attended)
        if layer.post_attention_norm is None:
            return layer.output.added_to(hidden, flat, out=hidden)
        return hidden.add_(layer.post_attention_norm(layer.output(flat)))

    def _mlp(self, layer: Layer, hidden: Tensor, room: Workspace) -> Tensor:
        gate_up = layer.gate_up(layer.mlp_norm(hidden, room.normed), room.gate_up)
        gated = self._gate(gate_up, room.gated)
        if layer.post_mlp_norm is None:
            return layer.down.added_to(hidden, gated, out=hidden)
        return hidden.add_(layer.post_mlp_norm(layer.down(gated)))
