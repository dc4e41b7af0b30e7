"""What batch_invariant costs: decoding and prefill with and without, in turn in one process.

    python bench/determinism.py [--model smollm2 | --shape Llama-3.2-1B] [--device cpu] [--dtype auto]
        [--weights auto] [--batches 1,8,32] [--rounds 5]

Prints a Markdown table of median tokens per second. Each round runs both modes in turn; the ratio is the
median of the rounds' ratios, so that what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import tokenstep as ts
from tokenstep import _native
from tokenstep.bench.shapes import SHAPES, model_arguments
from tokenstep.threads import let_idle_threads_sleep

let_idle_threads_sleep()
NEW_TOKENS = 32
PROMPT_TOKENS = 512
KV_TOKENS_A_ROW = PROMPT_TOKENS + 64


def decode(llm: ts.LLM, batch: int) -> float:
    """Tokens per second of `batch` sequences that decode together, from the first token on."""
    prompt = llm.tokenizer.encode("Once upon a time")
    params = {"max_tokens": NEW_TOKENS, "n": batch, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    seen: list[float] = []
    request = llm.complete(prompt, **params, stream=True)
    for _ in request:
        seen.append(time.perf_counter())
    return (len(seen) - batch) / (seen[-1] - seen[batch - 1])


def prefill(llm: ts.LLM, round_number: int) -> float:
    """Prompt tokens per second, of a prompt that no cache has."""
    ids = [(17 * round_number + 31 * i) % 40000 + 10 for i in range(PROMPT_TOKENS)]
    begin = time.perf_counter()
    llm.complete(ids, max_tokens=1, temperature=0)
    return PROMPT_TOKENS / (time.perf_counter() - begin)


def processor(device: torch.device) -> str:
    """The device's name and what of it is used."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, {_native.cpu.isa()}, torch {torch.__version__}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="random weights of this shape instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", default="1,8,32", metavar="B,…")
    parser.add_argument("--weights", default="auto", choices=("auto", "dequantised"))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    batches = [int(text) for text in args.batches.split(",")]
    with model_arguments(args.model, args.shape, args.weights) as model:
        plain, invariant = (
            ts.LLM(
                **model,
                device=args.device,
                dtype=args.dtype,
                max_batch=max(batches),
                kv_tokens=max(batches) * KV_TOKENS_A_ROW,
                batch_invariant=mode,
                progress=False,
            )
            for mode in (False, True)
        )
    cases: list[tuple[str, Callable[[ts.LLM, int], float]]] = [
        *(
            (f"decode, {batch} sequence{'s' * (batch > 1)}", lambda llm, _, batch=batch: decode(llm, batch))
            for batch in batches
        ),
        (f"prefill, {PROMPT_TOKENS} tokens", prefill),
    ]
    print("| | tok/s | tok/s with batch_invariant | ratio |")
    print("|---|---|---|---|")
    for name, measure in cases:
        rounds = [(measure(plain, 2 * i), measure(invariant, 2 * i + 1)) for i in range(args.rounds + 1)][1:]
        without, with_it = (statistics.median(values) for values in zip(*rounds, strict=True))
        ratio = statistics.median(b / a for a, b in rounds)
        print(f"| {name} | {without:.1f} | {with_it:.1f} | {ratio:.2f} |", flush=True)
    model_of = plain.service.engine.runner.model
    print(f"\n{args.shape or args.model}, {'+'.join(model_of.weight_forms)}; {processor(model_of.device)}")


if __name__ == "__main__":
    main()
