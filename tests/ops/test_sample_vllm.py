"""semantics="vllm" against vLLM's own operations: penalties, temperature, min-p, top-k and top-p.

Needs vLLM in the environment (a CPU build will do): python -m pytest -m peer tests/ops/test_sample_vllm.py
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from preset_checks import BANDS, LARGE, SMALL, Cuts, expect_same_rows, histories, tied_logits

from tokenstep import sampling as ts

pytestmark = pytest.mark.peer
pytest.importorskip("vllm")
torch = pytest.importorskip("torch")

ROWS = 24
NAMES = (
    "repetition_penalty", "frequency_penalty", "presence_penalty", "temperature", "min_p", "top_k", "top_p",
)  # fmt: skip
# Their CPU code multiplies by 1 / penalty, exact for powers of two; their CUDA code divides, as here.
PARAMETERS = [
    dict(zip(NAMES, values, strict=True))
    for values in itertools.product(
        (1.0, 2.0), (0.0, 0.25), (0.0, -0.5), (1.0, 0.7, 1.7), (0.0, 0.05), (0, 7, 60), (1.0, 0.9, 0.4)
    )
]


def penalised_by_theirs(x, prompts, outputs, p):
    from vllm.v1.sample.ops.penalties import apply_all_penalties

    longest = max(map(len, prompts))
    padded = torch.tensor([ids + [x.shape[1]] * (longest - len(ids)) for ids in prompts])

    def column(name):
        return torch.full((len(x),), p[name], dtype=torch.float32)

    return apply_all_penalties(
        torch.from_numpy(x.copy()),
        padded,
        column("presence_penalty"),
        column("frequency_penalty"),
        column("repetition_penalty"),
        outputs,
    )


def processed_by_theirs(x, prompts, outputs, p):
    """The logits before top-p, and at the end, in the order of their sampler."""
    from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
    from vllm.v1.sample.sampler import Sampler

    rows, vocab_size = x.shape
    logits = penalised_by_theirs(x, prompts, outputs, p)
    logits = Sampler.apply_temperature(logits, torch.full((rows,), p["temperature"]), all_random=True)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=rows))
    min_p = MinPLogitsProcessor(config, torch.device("cpu"), is_pin_memory=False)
    if p["min_p"]:
        min_p.min_p_count, min_p.min_p = rows, torch.full((rows, 1), p["min_p"])
    logits = min_p.apply(logits)
    k = torch.full((rows,), p["top_k"] or vocab_size, dtype=torch.int32)
    by_top_k = apply_top_k_top_p(logits.clone(), k.clone(), None)
    top_p = torch.full((rows,), p["top_p"]) if p["top_p"] < 1 else None
    return by_top_k.numpy(), apply_top_k_top_p(logits, k, top_p).numpy()


def check(p, vocab_size, seed):
    """Holds one batch to theirs; returns how many draws were the same token, of how many."""
    x = tied_logits(seed, ROWS, vocab_size)
    prompts, outputs = (histories(i, ROWS, vocab_size) for i in (2 * seed, 2 * seed + 1))
    by_top_k, theirs = processed_by_theirs(x, prompts, outputs, p)
    given = {**p, "prompt_tokens": prompts, "output_tokens": outputs, "semantics": "vllm"}
    ours = ts.apply_logits(x, **given)
    tokens = ts.sample(x, **given, seed=seed).tokens
    cuts = []
    for mine, row in zip(ours, by_top_k, strict=True):
        inside = np.isfinite(row)
        ranked = np.where(inside, row, np.where(np.isfinite(mine), mine, -np.float32(3e38)))
        cuts.append(Cuts(ranked, inside, p["top_p"], p["min_p"], BANDS[vocab_size]))
    return expect_same_rows(ours, theirs, cuts, tokens, seed, p), ROWS


def test_kept_sets_values_and_draws_are_those_of_vllm():
    counts = np.sum([check(p, SMALL, seed) for seed, p in enumerate(PARAMETERS)], axis=0)
    assert counts[0] > 0.7 * counts[1], "of the others a tie at top-p's boundary leaves open what is kept"


@pytest.mark.parametrize("number", [7, 101, 215, 322])
def test_kept_sets_values_and_draws_of_a_real_vocabulary_are_those_of_vllm(number):
    check(PARAMETERS[number], LARGE, number)


@pytest.mark.parametrize("penalty", [0.8, 1.1, 1.3, 3.0])
def test_penalties_are_those_of_vllm_within_two_ulps(penalty):
    p = {"repetition_penalty": penalty, "frequency_penalty": 0.3, "presence_penalty": -0.7}
    x = tied_logits(1, ROWS, SMALL)
    prompts, outputs = histories(3, ROWS, SMALL), histories(4, ROWS, SMALL)
    theirs = penalised_by_theirs(x, prompts, outputs, p)
    ours = ts.apply_logits(x, **p, prompt_tokens=prompts, output_tokens=outputs, semantics="vllm")
    scale = np.maximum(np.abs(x), 1).astype(np.float64)  # ulps of what is subtracted from
    assert (np.abs(ours.astype(np.float64) - theirs.numpy()) <= 2 * scale * 2.0**-22).all()


def test_rows_are_greedy_below_their_smallest_temperature():
    from vllm.v1.sample.sampler import _SAMPLING_EPS

    x = np.repeat(np.array([[1.0, 1.0, 0.5]], np.float32), 60, 0)
    for temperature, drawn in ((0.0, {0}), (_SAMPLING_EPS * 0.99, {0}), (_SAMPLING_EPS, {0, 1})):
        tokens = ts.sample(x, temperature, seed=1, position=np.arange(60), semantics="vllm").tokens
        assert set(tokens.tolist()) == drawn
