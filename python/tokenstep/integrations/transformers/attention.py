"""Our paged attention as ``attn_implementation="tokenstep"``: :func:`register`.

transformers' caches are tensors ``[B, Hkv, S, D]`` (static ones too). They are read as a paged cache without
a copy: a page is a whole sequence where none is padded; else a page is one slot, and a table of slots begins
each sequence behind its left padding. Which keys a query sees comes from the mask that transformers' own sdpa
would get, made once a forward pass and read once: a causal one, perhaps with left padding and a window, in
which the keys of a query are one run of slots that ends with its own. A mask of another form (packed
sequences, images, prefix-LM) and what the kernel does not do (gradients, dropout, unequal head sizes, other
devices) go to transformers' sdpa, which serves them all.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tokenstep.attention import paged_attention

__all__ = ["attention_forward", "register"]

NAME = "tokenstep"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def register(name: str = NAME) -> None:
    """Makes ``attn_implementation="tokenstep"`` known to transformers; more than once is fine.

    Then ``AutoModelForCausalLM.from_pretrained(…, attn_implementation="tokenstep")`` or
    ``model.set_attn_implementation("tokenstep")``. Both of transformers' registries get an entry: without one
    in that of masks, a model gets no mask at all and left padding is attended to in silence.

    Args:
        name: Another name, if that one is taken.
    """
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every attention layer.

    Args:
        module: The attention layer.
        query: ``[B, Hq, N, D]``, rotated.
        key: ``[B, Hkv, S, D]``, rotated: the cache with the new keys appended.
        value: The same of the values.
        attention_mask: None, or sdpa's: bool ``[B, 1, N, S]``, True where a key is seen.
        dropout: Of the weights, in training.
        scaling: Factor of the scores; None: 1 / sqrt(D).
        is_causal: None: what the layer says.
        sliding_window: The layer's window; it takes effect only where the mask has it.
        softcap: Of the scores.
        s_aux: One sink a query head, ``[Hq]``.
        **kwargs: For sdpa, where that has to run.

    Returns:
        ``[B, N, Hq, D]``, and None for the weights.

    Raises:
        ValueError: softcap or sinks, of which sdpa knows nothing, in a call that only sdpa could serve.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    refused = _refusal(query, key, value, dropout, kwargs)
    span = None if refused else _find_span(query, key, attention_mask, sliding_window, causal=causal)
    if span is None:
        if softcap is not None or s_aux is not None:
            reason = refused or "a mask that is not causal with a window"
            raise ValueError(
                f"tokenstep attention: {reason}, with softcap or sinks: use 'eager' for this model"
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    batch, num_heads, num_queries, head_dim = query.shape
    k_cache, v_cache, block_table = span.paged(key, value)
    out = paged_attention(
        query.transpose(1, 2).reshape(batch * num_queries, num_heads, head_dim),
        k_cache,
        v_cache,
        block_table,
        span.seq_lens,
        query_start=span.query_start,
        max_query_len=num_queries,
        scale=scaling,
        window=span.window,
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.detach().float(),
    )
    return out.view(batch, num_queries, num_heads, head_dim), None


def _refusal(query: Any, key: Any, value: Any, dropout: float, kwargs: dict[str, Any]) -> str | None:
    """Why the kernel cannot serve a call, if so."""
    if dropout > 0:
        return "dropout"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradients (use torch.no_grad())"
    if kwargs.get("position_bias") is not None or kwargs.get("cache") is not None:
        return "a position bias or a cache of continuous batching"
    if query.device.type not in ("cpu", "cuda") or query.dtype not in _DTYPES:
        return f"{query.dtype} on {query.device.type}"
    if (
        key.shape != value.shape
        or key.stride() != value.stride()
        or {key.dtype, value.dtype} != {query.dtype}
    ):
        return "keys and values of different shapes or types"
    if key.shape[0] > 1 and key.shape[2] > 1 and key.stride(0) % key.stride(2):
        return "a cache whose rows are not whole slots apart"
    head_dim = query.shape[-1]
    if head_dim != key.shape[-1] or head_dim % 8 or head_dim > 256 or key.stride(-1) != 1:
        return f"heads of {head_dim}"
    if torch.compiler.is_compiling():
        return "torch.compile (the mask is read on the host)"
    return None


@dataclass
class _Span:
    """The keys that the queries of one forward pass see: a run of slots each, up to the query's own.

    Attributes:
        starts: The first slot of each sequence.
        seq_lens: int32 ``[R]``. R is B; or 2B with padded queries, each sequence behind an empty one that
            holds those, so that they get zeros.
        query_start: int32 ``[R + 1]``, or None with one query each.
        window: As of :func:`tokenstep.paged_attention`.
    """

    starts: list[int]
    seq_lens: torch.Tensor
    query_start: torch.Tensor | None
    window: int | None
    tables: dict[int, torch.Tensor] = field(default_factory=dict)  # by slots from one sequence to the next

    def paged(
        self, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The cache as pages ``[num_blocks, block_size, Hkv, D]``, without a copy, and a block table."""
        batch, num_heads, slots, head_dim = key.shape
        if len(set(self.starts)) <= 1:  # a page is a sequence
            first = self.starts[0] if self.starts else 0
            if 0 not in self.tables:
                self.tables[0] = self._table(torch.arange(batch)[:, None], key.device)
            k, v = (cache[:, :, first:].transpose(1, 2) for cache in (key, value))
            return k, v, self.tables[0]
        apart = key.stride(0) // key.stride(2)
        if apart not in self.tables:
            first_slots = torch.tensor(self.starts) + apart * torch.arange(batch)
            steps = torch.arange(slots - min(self.starts))
            self.tables[apart] = self._table(first_slots[:, None] + steps, key.device)
        size = (apart * (batch - 1) + slots, 1, num_heads, head_dim)
        strides = (key.stride(2), key.stride(2), key.stride(1), 1)
        return key.as_strided(size, strides), value.as_strided(size, strides), self.tables[apart]

    def _table(self, blocks: torch.Tensor, device: torch.device) -> torch.Tensor:
        return blocks.repeat_interleave(len(self.seq_lens) // len(blocks), 0).int().to(device)


def _find_span(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, window: int | None, *, causal: bool
) -> _Span | None:
    """What the queries see, or None if that is no run of slots that ends with the query's own."""
    batch, _, num_queries, _ = query.shape
    slots = key.shape[2]
    if mask is None:
        if num_queries > 1 and not causal:
            return None
        # With more keys than queries this is the first pass of a static cache: the rest of it is empty.
        return _whole(batch, num_queries, slots if num_queries == 1 else num_queries, query.device)
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[3] != slots:
        return None
    # A mask serves many layers: what it says is kept with it.
    known: dict[Any, _Span | None] = mask.__dict__.setdefault("_tokenstep_spans", {})
    asked = (batch, window)
    if asked not in known:
        known[asked] = _read_mask(mask[:, 0].expand(batch, -1, -1), window)
    return known[asked]


@functools.lru_cache(maxsize=4)
def _whole(batch: int, num_queries: int, length: int, device: torch.device) -> _Span:
    """Sequences without padding: all layers of a pass ask for the same."""
    seq_lens = torch.full((batch,), length, dtype=torch.int32, device=device)
    query_start = None
    if num_queries > 1:
        query_start = torch.arange(batch + 1, dtype=torch.int32, device=device) * num_queries
    return _Span([0] * batch, seq_lens, query_start, None)


def _read_mask(seen: torch.Tensor, window: int | None) -> _Span | None:
    """The span of ``seen``, bool ``[B, N, S]``; None if it is not causal with left padding and the window."""
    batch, num_queries, slots = seen.shape
    slot = torch.arange(slots, device=seen.device)
    own = (seen[:, -1] * (slot + 1)).amax(-1) - 1  # the last query's slot; -1: it sees nothing
    any_seen = seen.any(1)
    start = torch.where(own < 0, 0, (~any_seen).int().argmin(-1))
    position = own[:, None] - torch.arange(num_queries - 1, -1, -1, device=seen.device)  # [B, N]
    causal = (slot <= position[..., None]) & (slot >= start[:, None, None])
    if num_queries == 1:
        window = None  # one run of slots is all that one query's mask can be
    if window is not None:
        causal &= slot > position[..., None] - window
    same = (causal == seen).all()
    lengths = own + 1 - start
    queries = lengths.clamp(max=num_queries)
    host = torch.stack([start, lengths, queries]).cpu()  # one copy from the device
    if not same:
        return None
    start, lengths, queries = host
    query_start = None
    if bool((queries < num_queries).any()):  # queries that are padding: see _Span
        lengths = torch.stack([torch.zeros_like(lengths), lengths], 1).flatten()
        counts = torch.stack([num_queries - queries, queries], 1).flatten()
        query_start = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    elif num_queries > 1:
        query_start = torch.arange(batch + 1, dtype=torch.int32) * num_queries
    device = seen.device
    return _Span(
        start.tolist(),
        lengths.int().to(device),
        None if query_start is None else query_start.to(device),
        window,
    )
