"""CuPy arrays on a GPU: sampling in one call, and step by step into arrays that are used again.

Work goes to CuPy's current stream, so that it is in order with CuPy's own. Needs a GPU.

    pip install tokenstep cupy-cuda13x
    python examples/sample_cupy.py
"""

from __future__ import annotations

import cupy as cp

import tokenstep as ts

VOCAB_SIZE = 32000


def in_one_call(logits: cp.ndarray) -> ts.SampleOutput:
    """Fields are CuPy arrays. The host waits for nothing: check ``status`` when you need it."""
    return ts.sample(logits, temperature=0.7, top_p=0.9, seed=1, logprobs=2)


def step_by_step(num_rows: int, steps: int) -> cp.ndarray:
    """The engine's form: one launch a step, nothing allocated; int64 ``[steps, num_rows]``."""
    sampler = ts.Sampler(num_rows, VOCAB_SIZE, "cuda")
    with cp.cuda.Stream(non_blocking=True) as stream:
        for row in range(num_rows):
            sampler.admit(row, ts.SamplingParams(temperature=0.8, presence_penalty=0.5, seed=row))
        out = ts.SampleOutput(cp.empty(num_rows, cp.int64), cp.empty(num_rows, cp.int32))
        texts = cp.empty((steps, num_rows), cp.int64)
        for step in range(steps):
            logits = cp.random.default_rng(step).standard_normal((num_rows, VOCAB_SIZE), dtype=cp.float32)
            texts[step] = sampler.step(logits, out=out).tokens
    stream.synchronize()
    return texts


def main() -> None:
    """Print what both forms give."""
    print(in_one_call(cp.random.default_rng(0).standard_normal((4, VOCAB_SIZE), dtype=cp.float32)))
    print(step_by_step(4, 8))


if __name__ == "__main__":
    main()
