"""What a KV cache of one byte an element costs in quality: perplexity and KL divergence by cache dtype.

    python bench/kv_cache_dtypes.py [--model smollm2] [--dtype float32] [--tokens 1024] [--write PAGE]

Texts of this repository (prose, a licence, code) go through the model in one pass each, once with a cache in
the model's own dtype and once with each quantised one. The KL divergence is that of the next token's
distribution from the one with the exact cache, over all positions. The same machine gives the same numbers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tokenstep.bench.machine import describe_machine
from tokenstep.models import ForwardBatch, KVCache, KVScales, LoadedModel, load
from tokenstep.models.kv_cache import KV_DTYPES, kv_bytes_per_token
from tokenstep.models.kv_scales import CALIBRATION_MARGIN, calibrate, choose_scales

ROOT = Path(__file__).parents[1]
TEXTS = (ROOT / "docs" / "sampling.md", ROOT / "LICENSE", ROOT / "python" / "tokenstep" / "sampling.py")
BEGIN, END = "<!-- kv dtypes: bench/kv_cache_dtypes.py -->\n", "<!-- end of kv dtypes -->\n"


@dataclass(frozen=True)
class Quality:
    """Against the exact cache, over all texts."""

    perplexity: float
    divergence: float
    same_top: float


def log_probs(loaded: LoadedModel, ids: list[int], cache: KVCache) -> torch.Tensor:
    """Of the token after each of `ids`, float64 [len(ids), vocab_size]."""
    logits = loaded.model.logits(loaded.model.forward(ForwardBatch.of_prompt(ids), cache))
    return logits[:, : loaded.tokenizer.vocab_size].double().log_softmax(-1)


def variants(loaded: LoadedModel) -> Iterator[tuple[str, str, torch.dtype, KVScales | None]]:
    """Dtype and scales for the table, and what they are."""
    model = loaded.model
    own = next(name for name, dtype in KV_DTYPES.items() if dtype == model.dtype)
    yield own, "", model.dtype, None
    float8, int8 = torch.float8_e4m3fn, torch.int8
    yield "float8_e4m3", "1 (the default)", float8, choose_scales(model, float8)
    yield "float8_e4m3", f"calibrated, × {CALIBRATION_MARGIN}", float8, calibrate(model, float8)
    yield "int8", f"calibrated, × {CALIBRATION_MARGIN} (the default)", int8, choose_scales(model, int8)
    for margin in (1.0, 2.0):
        yield "int8", f"calibrated, × {margin:g}", int8, calibrate(model, int8, margin=margin)


def quality(texts: list[list[int]], exact: list[torch.Tensor], found: list[torch.Tensor]) -> Quality:
    """Of the log probabilities `found` for `texts`."""
    loss = divergence = same = 0.0
    for ids, right, near in zip(texts, exact, found, strict=True):
        loss -= float(near[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean())
        divergence += float((right.exp() * (right - near)).sum(-1).mean())
        same += float((right.argmax(-1) == near.argmax(-1)).double().mean())
    count = len(texts)
    return Quality(math.exp(loss / count), divergence / count, same / count)


def table(loaded: LoadedModel, num_tokens: int) -> str:
    """Markdown, with what it was measured on."""
    texts = [loaded.tokenizer.encode(path.read_text(encoding="utf-8"))[:num_tokens] for path in TEXTS]
    lines = [
        "| cache | scales | bytes a token | perplexity | KL divergence | same likeliest token |",
        "|---|---|---|---|---|---|",
    ]
    exact: list[torch.Tensor] = []
    for name, scaled, dtype, scales in variants(loaded):
        passes = [
            log_probs(loaded, ids, KVCache.allocate(loaded.config, 1, len(ids), dtype, scales=scales))
            for ids in texts
        ]
        exact = exact or passes
        found = quality(texts, exact, passes)
        size = kv_bytes_per_token(loaded.config, dtype)
        lines.append(
            f"| {name} | {scaled} | {size:,} | {found.perplexity:.2f} | {found.divergence:.4f} |"
            f" {100 * found.same_top:.1f} % |"
        )
    m = describe_machine()
    return (
        "\n".join(lines) + f"\n\n`python bench/kv_cache_dtypes.py`: {loaded.name}, computed in"
        f" {str(loaded.model.dtype).removeprefix('torch.')}, {sum(map(len, texts)):,} tokens of"
        f" {len(texts)} texts; {m['cpu']} ({m['isa']}), torch {m['torch']}, {m['date']},"
        f" commit {m['commit']}.\n"
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=1024, help="of each text (default: 1024)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="between its markers")
    args = parser.parse_args()
    text = table(load(args.model, dtype=args.dtype), args.tokens)
    if args.write is None:
        print(text)
        return
    page = args.write.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    args.write.write_text(before + BEGIN + text + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
