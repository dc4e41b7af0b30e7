"""Draws follow the distribution that the parameters define: chi-square against exact probabilities in
float64."""

import numpy as np
import pytest

from tokenstep import sampling as ts
from tokenstep.reference import sampling as reference

stats = pytest.importorskip("scipy.stats")

VOCAB = 1000
LOGITS = (np.random.default_rng(0).standard_normal(VOCAB) * 1.5).astype(np.float32)
TOP = [int(i) for i in np.argsort(-LOGITS)]

SETTINGS = {
    "plain": {},
    "temperature_low": {"temperature": 0.7},
    "temperature_high": {"temperature": 1.6},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "top_p_small": {"top_p": 0.1},
    "min_p": {"min_p": 0.05},
    "repetition": {"repetition_penalty": 1.8, "prompt_tokens": TOP[:5], "output_tokens": TOP[3:9]},
    "frequency": {"frequency_penalty": 0.5, "output_tokens": TOP[:4] * 2 + TOP[:2]},
    "presence": {"presence_penalty": 1.2, "output_tokens": TOP[:7] * 3},
    "bias": {"logit_bias": {TOP[0]: -np.inf, TOP[1]: -2.0, TOP[500]: 6.0}},
    "bitmask": {"allowed": TOP[5:400:3]},
    "everything": {
        "temperature": 0.9, "top_k": 200, "top_p": 0.95, "min_p": 0.002, "repetition_penalty": 1.2,
        "presence_penalty": 0.1, "frequency_penalty": 0.2, "prompt_tokens": TOP[:30:2], "output_tokens":
        TOP[:9], "logit_bias": {TOP[3]: 1.0}, "allowed": TOP[::2] + TOP[1:20],
    },
}  # fmt: skip


def draws(settings, num_draws, seed=1234, rows=4000, dtype=np.float32):
    """``num_draws`` tokens at positions 0, 1, 2, …"""
    arguments = {k: v for k, v in settings.items() if k != "allowed"}
    for name in ("prompt_tokens", "output_tokens"):
        if name in arguments:
            arguments[name] = [arguments[name]] * rows
    if "allowed" in settings:
        mask = np.zeros(1024, bool)
        mask[settings["allowed"]] = True
        words = np.packbits(mask, bitorder="little").view(np.int32)
        arguments["token_bitmask"] = np.broadcast_to(words, (rows, 32))
    logits = np.broadcast_to(LOGITS.astype(dtype), (rows, VOCAB))
    return np.concatenate([
        ts.sample(logits, seed=seed, position=np.arange(first, first + rows), **arguments).tokens
        for first in range(0, num_draws, rows)
    ])  # fmt: skip


def assert_drawn_from(tokens, p):
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[p == 0].sum() == 0, "a token outside the kept set was drawn"
    expected = p * len(tokens)
    common = expected >= 10  # the rest in one bin, as the test needs
    observed, wanted = counts[common], expected[common]
    if expected[~common].sum() > 0:
        observed = np.append(observed, counts[~common].sum())
        wanted = np.append(wanted, expected[~common].sum())
    if len(wanted) > 1:
        assert stats.chisquare(observed, wanted * (observed.sum() / wanted.sum())).pvalue > 1e-4


@pytest.mark.parametrize("num_draws", [200_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_exact_distribution(name, num_draws):
    assert_drawn_from(draws(SETTINGS[name], num_draws), reference.probabilities(LOGITS, **SETTINGS[name]))


@pytest.mark.parametrize("vary", ["seed", "substream", "position"])
def test_draws_follow_the_distribution_along_each_of_seed_substream_and_position(vary):
    n = 100_000
    fixed = {"seed": 5, "substream": 6, "position": 7}
    logits = np.broadcast_to(LOGITS, (n, VOCAB))
    out = ts.sample(logits, top_k=100, **{**fixed, vary: np.arange(n)})
    assert_drawn_from(out.tokens, reference.probabilities(LOGITS, top_k=100))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"substream": 0}, {"substream": 1}),
        ({"substream": 1 << 16}, {"substream": 1}),
        ({"seed": 1}, {"seed": 2}),
        ({"seed": 1}, {"seed": 1 << 32}),
        ({"position": np.arange(200_000)}, {"position": np.arange(1, 200_001)}),
        ({"position": np.arange(200_000)}, {"position": np.arange(200_000) + (1 << 32)}),
    ],
)
def test_streams_are_independent(one, other):
    # 16 equally likely tokens: the pairs of draws fill a 16 x 16 table evenly.
    n = 200_000
    logits = np.zeros((n, 16), np.float32)
    base = {"seed": 99, "position": np.arange(n), "substream": 3}
    a, b = (ts.sample(logits, **{**base, **which}).tokens for which in (one, other))
    table = np.bincount(a * 16 + b, minlength=256)
    assert stats.chisquare(table).pvalue > 1e-4


def test_the_same_seed_position_and_substream_draw_the_same_token():
    logits = np.zeros((1000, 50_000), np.float32)
    tokens = ts.sample(logits, seed=7, position=8, substream=9).tokens
    assert (tokens == tokens[0]).all()


def test_rows_without_a_seed_draw_fresh_entropy_each():
    logits = np.zeros((64, 1 << 18), np.float32)
    first, second = ts.sample(logits).tokens, ts.sample(logits).tokens
    assert len(set(first.tolist())) > 60
    assert not np.array_equal(first, second)
    mixed = ts.sample(logits, seed=[5] * 32 + [None] * 32).tokens
    assert len(set(mixed[:32].tolist())) == 1
    assert len(set(mixed[32:].tolist())) > 28


def test_a_negative_seed_is_its_two_s_complement():
    logits = np.zeros((1, 50_000), np.float32)
    for seed in (-1, -(1 << 63), -12345):
        assert ts.sample(logits, seed=seed).tokens == ts.sample(logits, seed=seed + (1 << 64)).tokens


def test_log_probabilities_are_those_of_the_distribution():
    logits = np.stack([LOGITS * s for s in (0.1, 1.0, 3.0, 10.0)])
    settings = {"temperature": 0.8, "top_k": 300, "top_p": 0.97, "min_p": 1e-4}
    raw = ts.sample(logits, seed=1, logprobs=20)
    processed = ts.sample(logits, seed=1, logprobs=20, logprobs_mode="processed", **settings)
    for b, row in enumerate(logits):
        for out, p in (
            (raw, reference.probabilities(row)),
            (processed, reference.probabilities(row, **settings)),
        ):
            kept = p[out.top_tokens[b]] > 0
            with np.errstate(divide="ignore"):
                want = np.log(p[out.top_tokens[b]])
            np.testing.assert_allclose(out.top_logprobs[b][kept], want[kept], rtol=1e-6, atol=1e-6)
            assert (out.top_logprobs[b][~kept] == -np.inf).all()
            np.testing.assert_allclose(out.logprobs[b], np.log(p[out.tokens[b]]), rtol=1e-6, atol=1e-6)


def test_the_log_probability_of_a_nearly_certain_token_keeps_its_relative_accuracy():
    logits = np.full((3, 1000), -20.0, np.float32)
    logits[:, 3] = [0.0, -2.0, -5.0]
    out = ts.sample(logits, temperature=0, logprobs=0)
    want = -np.log1p(999 * np.exp(np.float64(-20) - logits[:, 3].astype(np.float64)))
    np.testing.assert_allclose(out.logprobs, want, rtol=5e-4)  # weights are whole numbers of 2^-40
