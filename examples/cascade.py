"""Cascade attention: a prefix that many sequences share is read once, then merged with what follows it.

Sequences that begin with the same system prompt share its blocks. Plain paged attention reads those keys and
values once per sequence; here the queries of all sequences attend to the prefix as if they were heads of a
single one, which reads it once, and `merge_attention` joins the two results exactly (as in FlashInfer's
cascade inference, Ye et al., arXiv 2501.01005). Queries are already rotated: their positions differ.

    python examples/cascade.py --batch 32 --prefix 4096 --suffix 64
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

import tokenstep as ts

Pair = tuple[torch.Tensor, torch.Tensor]


def attend_to_prefix(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, blocks: torch.Tensor, length: int
) -> Pair:
    """Attention of all queries over one range of keys.

    Args:
        q: ``[B, Hq, D]``, one query a sequence.
        k_cache: Keys ``[num_blocks, block_size, Hkv, D]``.
        v_cache: Values, the same shape.
        blocks: int32: the prefix's blocks, in order.
        length: Tokens of the prefix.

    Returns:
        ``out [B, Hq, D]`` and ``lse [B, Hq]``.
    """
    batch, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    group = num_heads // num_kv_heads
    # The query heads of one KV head lie side by side, so those of all sequences make one large group.
    merged = q.view(batch, num_kv_heads, group, head_dim).transpose(0, 1).reshape(1, -1, head_dim)
    lengths = torch.tensor([length], dtype=torch.int32, device=q.device)
    out, lse = ts.paged_attention(merged, k_cache, v_cache, blocks[None], lengths, return_lse=True)
    by_sequence = (num_kv_heads, batch, group)
    return (
        out.view(*by_sequence, head_dim).transpose(0, 1).reshape(q.shape),
        lse.view(by_sequence).transpose(0, 1).reshape(batch, num_heads),
    )


def cascade_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    prefix_blocks: torch.Tensor,
    prefix_length: int,
    suffix_table: torch.Tensor,
    suffix_lens: torch.Tensor,
) -> Pair:
    """Decode attention of sequences that share a prefix: ``out [B, Hq, D]``, ``lse [B, Hq]``.

    ``suffix_table`` and ``suffix_lens`` are a block table and lengths of what follows the prefix.
    """
    prefix = attend_to_prefix(q, k_cache, v_cache, prefix_blocks, prefix_length)
    suffix = ts.paged_attention(q, k_cache, v_cache, suffix_table, suffix_lens, return_lse=True)
    outs, lses = zip(prefix, suffix, strict=True)
    return ts.merge_attention(torch.stack(outs), torch.stack(lses))


def median_ms(function: Callable[[], object], device: str, rounds: int = 7) -> float:
    """Milliseconds of one call, until the device is done."""
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        function()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 1e3 * sorted(times[1:])[rounds // 2]


def main(arguments: list[str] | None = None) -> float:
    """Compare both ways; returns the largest difference of their outputs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prefix", type=int, default=4096, help="tokens, a multiple of the block size")
    parser.add_argument("--suffix", type=int, default=64, help="tokens of each sequence after it")
    parser.add_argument("--heads", type=int, nargs=3, default=(32, 8, 128), metavar=("HQ", "HKV", "D"))
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    if args.prefix % args.block_size:
        parser.error("--prefix must be a multiple of --block-size: sequences share whole blocks")
    num_heads, num_kv_heads, head_dim = args.heads
    torch.manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(getattr(torch, args.dtype)).to(args.device)

    prefix_blocks = args.prefix // args.block_size
    suffix_blocks = -(-args.suffix // args.block_size)
    ids = torch.randperm(prefix_blocks + args.batch * suffix_blocks).to(torch.int32).to(args.device)
    shared, own = ids[:prefix_blocks], ids[prefix_blocks:].view(args.batch, suffix_blocks)
    k_cache, v_cache = (normal(len(ids), args.block_size, num_kv_heads, head_dim) for _ in "kv")
    q = normal(args.batch, num_heads, head_dim)
    suffix_lens = torch.full((args.batch,), args.suffix, dtype=torch.int32, device=args.device)
    table = torch.cat([shared.expand(args.batch, -1), own], 1)

    def plain() -> torch.Tensor:
        out: torch.Tensor = ts.paged_attention(q, k_cache, v_cache, table, suffix_lens + args.prefix)
        return out

    def cascade() -> torch.Tensor:
        return cascade_attention(q, k_cache, v_cache, shared, args.prefix, own, suffix_lens)[0]

    difference = float((cascade().float() - plain().float()).abs().max())
    token_bytes = 2 * num_kv_heads * head_dim * q.itemsize
    for name, function, prefixes in (("plain", plain, args.batch), ("cascade", cascade, 1)):
        read = token_bytes * (prefixes * args.prefix + args.batch * args.suffix)
        print(
            f"{name:8s} {median_ms(function, args.device):9.2f} ms   {read / 1e6:9.1f} MB of keys and values"
        )
    print(f"largest difference of the outputs: {difference:.2g}")
    return difference


if __name__ == "__main__":
    main()
