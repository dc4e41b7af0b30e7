"""Sample from NumPy logits: one request a row, each with parameters of its own, no torch in sight.

Whatever has DLPack works alike (JAX, CuPy, torch), and results are of the kind of the logits.

    python examples/sample_numpy.py
"""

from __future__ import annotations

import numpy as np

import tokenstep as ts

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "slept", "."]


def bigram_logits(last: np.ndarray) -> np.ndarray:
    """A model of sorts: float32 ``[B, V]`` logits after each row's last word."""
    table = np.random.default_rng(0).normal(scale=2.0, size=(len(WORDS), len(WORDS))).astype(np.float32)
    return table[last]


def in_one_call(logits: np.ndarray) -> ts.SampleOutput:
    """Everything about a step in one call: a scalar holds for all rows, a list has one value a row."""
    return ts.sample(
        logits,
        temperature=[0.0, 0.7, 1.2],  # 0 is greedy
        top_k=[0, 5, 0],
        top_p=[1.0, 1.0, 0.9],
        min_p=0.02,
        logit_bias=[{WORDS.index("."): -np.inf}, None, None],  # the first row never ends
        seed=[1, 2, 3],
        position=0,
        logprobs=2,
    )


def step_by_step(steps: int) -> list[str]:
    """The engine's form: parameters and histories stay in the sampler, a step is the logits alone."""
    last = np.zeros(3, np.int64)  # three sequences that begin with "the"
    sampler = ts.Sampler(max_rows=3, vocab_size=len(WORDS))
    for row in range(3):
        params = ts.SamplingParams(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.5, seed=row)
        sampler.admit(row, params, prompt_tokens=[0])
    texts = [["the"], ["the"], ["the"]]
    for _ in range(steps):
        last = sampler.step(bigram_logits(last)).tokens
        for text, token in zip(texts, last, strict=True):
            text.append(WORDS[token])
    return [" ".join(text) for text in texts]


def main() -> None:
    """Print what both forms give."""
    out = in_one_call(bigram_logits(np.array([0, 1, 2])))
    for token, logprob, rank in zip(out.tokens, out.logprobs, out.ranks, strict=True):
        print(f"{WORDS[token]:6s} log probability {logprob:.3f}, rank {rank}")
    print(*step_by_step(8), sep="\n")


if __name__ == "__main__":
    main()
