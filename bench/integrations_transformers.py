"""What the fused sampler and the attention gain inside transformers: a step's sampling, whole generate calls.

Everything is on: repetition penalty, temperature, top-k, top-p, min-p. The functions take turns within each
round. Without --model the weights are random, in SmolLM2-135M's shape: speed does not depend on them, but for
flat rows, on which every sampler is slower.

    python bench/integrations_transformers.py [--model FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from tokenstep.bench.report import OURS, Report
from tokenstep.bench.timer import Timing, interleave
from tokenstep.integrations.transformers import generate_with, register
from tokenstep.integrations.transformers.chain import Chain
from tokenstep.integrations.transformers.draw import Draw
from tokenstep.integrations.transformers.plan import Plan

PARAMETERS = {"repetition_penalty": 1.1, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02}
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
PEER = "transformers"


class IntegrationReport(Report):
    """Rows of two sorts, by `part`: sampling and generate."""

    def markdown(self) -> str:
        """A table of each part: medians, and transformers' time over each."""
        tables = []
        for part, unit in (("sampling", "µs a step"), ("generate", "ms a step")):
            cases = [(case, times) for case, times in self.cases() if case["part"] == part]
            if not cases:
                continue
            names = [name for name in cases[0][0] if name != "part"]
            impls = list(cases[0][1])
            header = [*names, f"{PEER} {unit}"]
            header += [cell for impl in impls if impl != PEER for cell in (f"{impl} {unit}", "faster by")]
            lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
            for case, times in cases:
                cells = [*(str(case[name]) for name in names), _number(times[PEER], part)]
                for impl in impls:
                    if impl != PEER:
                        cells += [_number(times[impl], part), f"{times[PEER] / times[impl]:.2f}×"]
                lines.append("| " + " | ".join(cells) + " |")
            tables.append("\n".join(lines))
        m, s = self.machine, self.settings
        tables.append(
            f"Medians on {m['cpu']}, {m['cores']} cores ({m['isa']}), torch {m['torch']}, transformers"
            f" {s['transformers']}, {s['model']}, {s['prompt_tokens']} prompt and {s['new_tokens']} new"
            f" tokens, commit {m['commit']}, {m['date']}."
        )
        return "\n\n".join(tables)


def _number(microseconds: float, part: str) -> str:
    return f"{microseconds:.0f}" if part == "sampling" else f"{microseconds / 1e3:.2f}"


def sampling(batch: int, vocab_size: int, prompt_tokens: int) -> dict[str, Callable[[], object]]:
    """One step's way from float32 logits to tokens, by each implementation."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, vocab_size, generator=generator) * 3
    ids = torch.randint(0, vocab_size, (batch, prompt_tokens), generator=generator)
    chain = LogitsProcessorList(
        [
            theirs.RepetitionPenaltyLogitsProcessor(PARAMETERS["repetition_penalty"]),
            theirs.TemperatureLogitsWarper(PARAMETERS["temperature"]),
            theirs.TopKLogitsWarper(int(PARAMETERS["top_k"])),
            theirs.TopPLogitsWarper(PARAMETERS["top_p"]),
            theirs.MinPLogitsWarper(PARAMETERS["min_p"]),
        ]
    )

    def transformers_step() -> torch.Tensor:
        scores = chain(ids, logits.clone())  # generate copies the logits too
        return torch.multinomial(scores.softmax(-1), 1)

    def ours(parameters: dict[str, Any]) -> Callable[[], object]:
        plan = Plan(LogitsProcessorList(), Chain(**parameters), greedy=False, ignore=None)
        draw = Draw(plan, ids, seed=0, scored=False)
        return lambda: draw(logits, ids)

    return {
        PEER: transformers_step,
        OURS: ours(PARAMETERS),
    }


def generating(
    model: Any, batch: int, prompt_tokens: int, new_tokens: int
) -> dict[str, Callable[[], object]]:
    """A whole call of generate, by each implementation."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 20000, (batch, prompt_tokens), generator=generator)
    options = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "do_sample": True,
        "max_new_tokens": new_tokens,
        "eos_token_id": None,
        "pad_token_id": 0,
        **PARAMETERS,
    }
    register()
    attending = copy.deepcopy(model)
    attending.set_attn_implementation("tokenstep")

    def call(generate: Callable[..., Any], **more: Any) -> Callable[[], object]:
        return lambda: generate(**options | more)

    return {
        PEER: call(model.generate),
        OURS: call(generate_with(model), seed=0),
        "and our attention": call(generate_with(attending), seed=0),
        "transformers, greedy": call(model.generate, do_sample=False, repetition_penalty=1.0),
    }


def main() -> None:
    """Measure, print two tables, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a folder in Hugging Face's format; see bench/dequantise.py")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument(
        "--vocab-sizes", type=int, nargs="*", default=[49152, 128256], help="of the step alone"
    )
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.model:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    else:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2)).to(dtype).eval()
    transformers.logging.set_verbosity_error()
    report = IntegrationReport(
        "integrations transformers",
        {
            "transformers": transformers.__version__,
            "model": f"{args.model or 'random weights of SmolLM2-135M'} in {args.dtype}",
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "parameters": PARAMETERS,
        },
    )
    for vocab_size in args.vocab_sizes:
        for batch in args.batches:
            steps = sampling(batch, vocab_size, args.prompt_tokens)
            for impl, timing in interleave(
                steps, min_rounds=3 * args.rounds, max_rounds=3 * args.rounds
            ).items():
                report.add(
                    {"part": "sampling", "vocab_size": vocab_size, "batch": batch, "impl": impl}, timing
                )
    for batch in args.batches:
        calls = generating(model, batch, args.prompt_tokens, args.new_tokens)
        for impl, timing in interleave(calls, min_rounds=args.rounds, max_rounds=args.rounds).items():
            step = Timing(timing.median_us / args.new_tokens, timing.p20_us / args.new_tokens, timing.rounds)
            report.add({"part": "generate", "batch": batch, "impl": impl}, step)
    print(report.markdown())
    if args.json:
        report.save(args.json)


if __name__ == "__main__":
    main()
