"""apply_logits against transformers' logits processors: the same kept set, the same values within 2 ulp.

transformers works in the order repetition, temperature, top-k, top-p, min-p, keeps ties at the k-th value and
sums rounded probabilities. Compared are each processor alone and the chains whose order does not matter; rows
whose cut falls on a tie or within rounding of the boundary are left out, and must be few.
"""

import numpy as np
import pytest

from tokenstep import sampling as ts

torch = pytest.importorskip("torch")
processors = pytest.importorskip("transformers.generation.logits_process")


def rows_of(vocab_size):
    return 200 if vocab_size < 5000 else 40


def logits(vocab_size, seed=0):
    rng = np.random.default_rng([30, vocab_size, seed])
    scale = rng.uniform(0.5, 5, (rows_of(vocab_size), 1))
    return torch.from_numpy((rng.standard_normal((len(scale), vocab_size)) * scale).astype(np.float32))


def ids(vocab_size, n=40):
    return torch.from_numpy(np.random.default_rng(31).integers(0, vocab_size, (rows_of(vocab_size), n)))


def chain(input_ids, scores, *steps):
    for step in steps:
        scores = step(input_ids, scores)
    return scores


def ulps(a, b):
    """Distance of float32 numbers in units in the last place."""
    a, b = (np.asarray(v, np.float32).view(np.int32).astype(np.int64) for v in (a, b))
    a, b = (np.where(v < 0, -(v & 0x7FFFFFFF), v) for v in (a, b))
    return np.abs(a - b)


def assert_same_where_clear(ours, theirs, clear, most_ulps=2):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert clear.mean() > 0.8, "too many rows are left out"
    kept = np.isfinite(ours)
    assert np.array_equal(kept[clear], np.isfinite(theirs)[clear])
    both = kept & np.isfinite(theirs)
    assert ulps(ours[both], theirs[both]).max(initial=0) <= most_ulps


def clear_of_ties(x, k):
    in_order = -np.sort(-np.asarray(x), axis=1)
    return in_order[:, k - 1] != in_order[:, k] if k < x.shape[1] else np.ones(len(x), bool)


def clear_of_share(x, p):
    """Rows in which no prefix's exact share lies within rounding of p."""
    q = np.exp(np.asarray(x, np.float64))
    q = -np.sort(-q / q.sum(axis=1, keepdims=True), axis=1)
    return np.abs(np.cumsum(q, axis=1) - p).min(axis=1) > 1e-7


def clear_of_ratio(x, m):
    x = np.asarray(x, np.float64)
    return np.abs(x - x.max(axis=1, keepdims=True) - np.log(m)).min(axis=1) > 2e-6


VOCABULARIES = [50, 1000, 32003]


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 1.7])
def test_temperature(vocab_size, temperature):
    x = logits(vocab_size)
    theirs = chain(None, x, processors.TemperatureLogitsWarper(temperature))
    assert_same_where_clear(ts.apply_logits(x, temperature=temperature), theirs, np.ones(len(x), bool))


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("penalty", [0.8, 1.1, 2.0])
def test_repetition_penalty(vocab_size, penalty):
    x, seen = logits(vocab_size), ids(vocab_size)
    theirs = chain(seen, x.clone(), processors.RepetitionPenaltyLogitsProcessor(penalty))
    for split in (0, 15, 40):
        ours = ts.apply_logits(
            x,
            repetition_penalty=penalty,
            prompt_tokens=seen[:, :split].tolist(),
            output_tokens=seen[:, split:].tolist(),
        )
        assert_same_where_clear(ours, theirs, np.ones(len(x), bool), most_ulps=0)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("top_k", [1, 5, 49])
def test_top_k(vocab_size, top_k):
    x = logits(vocab_size)
    theirs = chain(None, x, processors.TopKLogitsWarper(top_k))
    assert_same_where_clear(ts.apply_logits(x, top_k=top_k), theirs, clear_of_ties(x, top_k), most_ulps=0)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_top_p(vocab_size, top_p):
    x = logits(vocab_size)
    theirs = chain(None, x.double(), processors.TopPLogitsWarper(float(np.float32(top_p))))
    assert_same_where_clear(ts.apply_logits(x, top_p=top_p), theirs, clear_of_share(x, np.float32(top_p)), 0)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("min_p", [0.001, 0.05, 0.5])
def test_min_p(vocab_size, min_p):
    x = logits(vocab_size)
    theirs = chain(None, x.double(), processors.MinPLogitsWarper(min_p))
    assert_same_where_clear(ts.apply_logits(x, min_p=min_p), theirs, clear_of_ratio(x, np.float32(min_p)), 0)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.7, 40, 0.9), (1.3, 10, 0.5), (1.0, 49, 0.95)])
def test_repetition_then_temperature_then_top_k_then_top_p(vocab_size, temperature, top_k, top_p):
    x, seen = logits(vocab_size, 1), ids(vocab_size)
    steps = [
        processors.RepetitionPenaltyLogitsProcessor(1.2),
        processors.TemperatureLogitsWarper(temperature),
    ]
    edited = chain(seen, x.clone(), *steps)
    by_k = chain(seen, edited, processors.TopKLogitsWarper(top_k))
    theirs = chain(seen, by_k.double(), processors.TopPLogitsWarper(float(np.float32(top_p))))
    ours = ts.apply_logits(
        x,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=1.2,
        output_tokens=seen.tolist(),
    )
    clear = clear_of_ties(edited, top_k) & clear_of_share(by_k, np.float32(top_p))
    assert_same_where_clear(ours, theirs, clear)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize(("top_k", "min_p"), [(20, 0.1), (5, 0.01), (49, 0.3)])
def test_top_k_and_min_p_in_either_order(vocab_size, top_k, min_p):
    x = logits(vocab_size, 2)
    steps = (processors.TemperatureLogitsWarper(0.8), processors.TopKLogitsWarper(top_k))
    by_k = chain(None, x, *steps)
    theirs = chain(None, by_k.double(), processors.MinPLogitsWarper(min_p))
    ours = ts.apply_logits(x, temperature=0.8, top_k=top_k, min_p=min_p)
    clear = clear_of_ties(x, top_k) & clear_of_ratio(x / 0.8, np.float32(min_p))
    assert_same_where_clear(ours, theirs, clear)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_sample_draws_only_what_transformers_keeps(vocab_size):
    x = logits(vocab_size, 3)
    by_k = chain(None, x / 0.9, processors.TopKLogitsWarper(30))
    theirs = chain(None, by_k.double(), processors.TopPLogitsWarper(float(np.float32(0.8))))
    clear = torch.from_numpy(clear_of_ties(x, 30) & clear_of_share(by_k, np.float32(0.8)))
    for position in range(20):
        tokens = ts.sample(x, temperature=0.9, top_k=30, top_p=0.8, seed=1, position=position).tokens
        assert torch.isfinite(theirs.gather(1, tokens[:, None])[clear]).all()
