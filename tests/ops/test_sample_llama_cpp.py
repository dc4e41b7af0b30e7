"""semantics="llama.cpp" against llama.cpp's own chain of samplers, through llama-cpp-python's C API.

python -m pytest -m peer tests/ops/test_sample_llama_cpp.py
"""

import ctypes
import itertools

import numpy as np
import pytest
from preset_checks import BANDS, LARGE, SMALL, Cuts, expect_same_rows, histories, tied_logits

from tokenstep import sampling as ts

pytestmark = pytest.mark.peer
llama_cpp = pytest.importorskip("llama_cpp")

ROWS = 12
CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
NAMES = (
    "penalty_last_n", "repetition_penalty", "frequency_penalty", "presence_penalty", "temperature", "top_k",
    "top_p", "min_p",
)  # fmt: skip
OFF = dict(zip(NAMES, (64, 1.0, 0.0, 0.0, 1.0, 0, 1.0, 0.0), strict=True))
PENALTIES = [(64, 1.0, 0.0, 0.0), (64, 1.1, 0.25, -0.5), (5, 0.8, 0.3, 0.1), (0, 1.3, 0.5, 0.5)]
PARAMETERS = [
    dict(zip(NAMES, (*penalties, *values), strict=True))
    for penalties in PENALTIES
    for values in itertools.product((1.0, 0.7, 1.7), (0, 7, 60), (1.0, 0.9, 0.4), (0.0, 0.05))
]


def chain_of(p, vocab_size):
    """Their samplers in the order of their default chain, without those that have no parameter here."""
    c = llama_cpp
    chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
    for sampler in (
        c.llama_sampler_init_penalties(
            vocab_size,
            p["penalty_last_n"],
            p["repetition_penalty"],
            p["frequency_penalty"],
            p["presence_penalty"],
        ),
        c.llama_sampler_init_top_k(p["top_k"]),
        c.llama_sampler_init_top_p(p["top_p"], 1),
        c.llama_sampler_init_min_p(p["min_p"], 1),
        c.llama_sampler_init_temp(p["temperature"]),
        c.llama_sampler_init_dist(7),
    ):
        c.llama_sampler_chain_add(chain, sampler)
    return chain


def run_theirs(x, tokens, p):
    """Kept [V], logits float32 [V] at the end (-inf where cut) and probabilities [V] of one row."""
    chain = chain_of(p, len(x))
    for token in tokens:
        llama_cpp.llama_sampler_accept(chain, token)
    candidates = np.zeros(len(x), CANDIDATE)
    candidates["id"], candidates["logit"] = np.arange(len(x)), x
    data = candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
    array = llama_cpp.llama_token_data_array(data, len(x), -1, False)
    llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
    llama_cpp.llama_sampler_free(chain)
    left = candidates[: array.size]
    logits, shares = np.full(len(x), -np.inf, np.float32), np.zeros(len(x))
    logits[left["id"]], shares[left["id"]] = left["logit"], left["p"]
    return np.isfinite(logits), logits, shares


def check(p, vocab_size, seed):
    """Holds rows to theirs; returns how many draws were the same token, of how many."""
    x = tied_logits(seed, ROWS, vocab_size)
    prompts, outputs = (histories(i, ROWS, vocab_size, 60) for i in (2 * seed, 2 * seed + 1))
    given = {**p, "prompt_tokens": prompts, "output_tokens": outputs, "semantics": "llama.cpp"}
    edited = ts.apply_logits(x, **{**given, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0})
    by_top_k = ts.apply_logits(x, **{**given, "temperature": 1.0, "top_p": 1.0, "min_p": 0.0})
    ours = ts.apply_logits(x, **given)
    tokens = ts.sample(x, **given, seed=seed).tokens
    cuts = [
        Cuts(x4, np.isfinite(row), p["top_p"], p["min_p"], BANDS[vocab_size], exactly_k=p["top_k"] > 0)
        for x4, row in zip(edited, by_top_k, strict=True)
    ]
    runs = [run_theirs(*row, p) for row in zip(x, map(list.__add__, prompts, outputs), strict=True)]
    theirs, shares = (np.stack([run[i] for run in runs]) for i in (1, 2))
    return expect_same_rows(ours, theirs, cuts, tokens, seed, p, shares), ROWS


def test_kept_sets_values_and_draws_are_those_of_llama_cpp():
    counts = np.sum([check(p, SMALL, seed) for seed, p in enumerate(PARAMETERS)], axis=0)
    assert counts[0] > 0.6 * counts[1], "of the others a tie at a boundary leaves open what is kept"


@pytest.mark.parametrize("number", [10, 71, 131, 190])
def test_kept_sets_values_and_draws_of_a_real_vocabulary_are_those_of_llama_cpp(number):
    check(PARAMETERS[number], LARGE, number)


def test_temperature_zero_is_greedy():
    x = tied_logits(3, 4, SMALL)[1::2]
    tokens = ts.sample(x, temperature=0.0, top_k=9, top_p=0.9, semantics="llama.cpp").tokens
    for row, token in zip(x, tokens.tolist(), strict=True):
        kept, _, _ = run_theirs(row, [], OFF | {"temperature": 0.0, "top_k": 9, "top_p": 0.9})
        assert np.flatnonzero(kept).tolist() == [token]


def test_a_sampler_s_window_moves_on_as_theirs_does():
    """Their penalties accept token by token; ours keep a window in the sampler's slot."""
    p = OFF | {"penalty_last_n": 6, "repetition_penalty": 1.5, "frequency_penalty": 0.5, "temperature": 0.0}
    rng = np.random.default_rng(5)
    sampler = ts.Sampler(1, 40, semantics="llama.cpp")
    params = {name: value for name, value in p.items() if name != "top_p"}
    sampler.admit(0, ts.SamplingParams(**params), [1, 2, 3])
    history = [1, 2, 3]
    for _ in range(60):
        x = rng.standard_normal(40).astype(np.float32)
        token = int(sampler.step(x[None]).tokens[0])
        kept, _, _ = run_theirs(x, history, p)
        assert np.flatnonzero(kept).tolist() == [token]
        history.append(token)
