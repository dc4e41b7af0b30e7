"""What the benchmarks of attention run on: one decode step of one layer, over pages in random order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["CACHE_DTYPES", "COLD_BYTES", "HEADS", "LENGTHS", "Heads", "Inputs", "lengths_of", "make_inputs"]

COLD_BYTES = 128 << 20
CACHE_DTYPES = {"same": None, "float8_e4m3": "float8_e4m3fn", "int8": "int8"}  # their names in torch
LENGTHS = ("equal", "skewed")


@dataclass(frozen=True)
class Heads:
    """The shape of a model's attention."""

    model: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


HEADS = {
    heads.model: heads
    for heads in (
        Heads("SmolLM2-135M", 9, 3, 64),
        Heads("Llama-3.1-8B", 32, 8, 128),
        Heads("Llama-3.1-70B", 64, 8, 128),
        Heads("Llama-2-7B", 32, 32, 128),
        Heads("Gemma-2-9B", 16, 8, 256),
    )
}


@dataclass(frozen=True)
class Inputs:
    """Arguments of ``paged_attention``, with caches that together exceed the last-level cache."""

    heads: Heads
    lengths: list[int]
    block_size: int
    q: Any  # [B, Hq, D]
    caches: list[tuple[Any, Any]]
    block_table: Any
    seq_lens: Any
    scales: dict[str, Any]

    @property
    def cache_bytes(self) -> int:
        """Of keys and values that a call must read, in the type of the cache."""
        per_token = 2 * self.heads.num_kv_heads * self.heads.head_dim * self.caches[0][0].element_size()
        return int(sum(self.lengths) * per_token)

    @property
    def moved_bytes(self) -> int:
        """Of all that a call must read and write: keys, values, queries and results."""
        return int(self.cache_bytes + 2 * self.q.numel() * self.q.element_size())


def lengths_of(kind: str, batch: int, context: int) -> list[int]:
    """Lengths of a batch with ``batch * context`` tokens: all equal, or one with half of all tokens."""
    if kind == "equal" or batch == 1:
        return [context] * batch
    rest = max(1, batch * context // 2 // (batch - 1))
    return [batch * context - rest * (batch - 1)] + [rest] * (batch - 1)


def make_inputs(
    heads: Heads, lengths: list[int], block_size: int, dtype: str, cache_dtype: str, device: str
) -> Inputs:
    """Random inputs. ``cache_dtype`` is one of ``CACHE_DTYPES``, "same" being that of the queries."""
    import torch

    generator = torch.Generator(device).manual_seed(1)
    held_name = CACHE_DTYPES[cache_dtype]
    of_queries = getattr(torch, dtype)
    held = of_queries if held_name is None else getattr(torch, held_name)
    largest = {None: 4.0, "int8": 127.0, "float8_e4m3fn": 448.0}[held_name]

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, device=device)

    blocks = [-(-length // block_size) for length in lengths]
    read_bytes = 2 * sum(lengths) * heads.num_kv_heads * heads.head_dim * held.itemsize
    shape = (sum(blocks), block_size, heads.num_kv_heads, heads.head_dim)

    def cache() -> Any:
        return (normal(*shape) * (largest / 4)).clamp(-largest, largest).to(held)

    order = torch.randperm(sum(blocks), generator=generator, device=device).to(torch.int32)
    table = torch.full((len(lengths), max(blocks)), -1, dtype=torch.int32, device=device)
    for row, ids in zip(table, torch.split(order, blocks), strict=True):
        row[: len(ids)] = ids
    scales: dict[str, Any] = {}
    if held_name is not None:
        scale = torch.full((heads.num_kv_heads,), 4 / largest, device=device)
        scales = {"k_scale": scale, "v_scale": scale}
    return Inputs(
        heads,
        lengths,
        block_size,
        normal(len(lengths), heads.num_heads, heads.head_dim).to(of_queries),
        [(cache(), cache()) for _ in range(max(2, COLD_BYTES // read_bytes))],
        table,
        torch.tensor(lengths, dtype=torch.int32, device=device),
        scales,
    )
