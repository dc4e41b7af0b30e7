"""semantics="transformers" against transformers' own logits processors in float32, ties included."""

import itertools

import numpy as np
import pytest
from preset_checks import BANDS, LARGE, SMALL, Cuts, expect_same_rows, histories, tied_logits

from tokenstep import sampling as ts

torch = pytest.importorskip("torch")
processors = pytest.importorskip("transformers.generation.logits_process")

ROWS = 12
PARAMETERS = [
    dict(zip(("repetition_penalty", "temperature", "top_k", "top_p", "min_p"), values, strict=True))
    for values in itertools.product((1.0, 1.3), (1.0, 0.7, 1.7), (0, 7, 60), (1.0, 0.9, 0.4), (0.0, 0.05))
]


def processed_by_theirs(x, seen, p):
    """The scores after each of their steps, up to top-k and at the end."""
    scores = torch.from_numpy(x.copy())
    if p["repetition_penalty"] != 1:
        for row, ids in enumerate(seen):  # one row at a time: histories differ in length
            one = processors.RepetitionPenaltyLogitsProcessor(p["repetition_penalty"])
            if ids:
                scores[row : row + 1] = one(torch.tensor([ids]), scores[row : row + 1])
    if p["temperature"] != 1:
        scores = processors.TemperatureLogitsWarper(p["temperature"])(None, scores)
    if p["top_k"]:
        scores = processors.TopKLogitsWarper(p["top_k"])(None, scores)
    by_top_k = scores
    if p["top_p"] < 1:
        scores = processors.TopPLogitsWarper(p["top_p"])(None, scores)
    if p["min_p"]:
        scores = processors.MinPLogitsWarper(p["min_p"])(None, scores)
    return by_top_k.numpy(), scores.numpy()


def check(p, vocab_size, seed):
    """Holds one batch to theirs; returns how many draws were the same token, of how many."""
    x, seen = tied_logits(seed, ROWS, vocab_size), histories(seed, ROWS, vocab_size)
    by_top_k, theirs = processed_by_theirs(x, seen, p)
    ours = ts.apply_logits(x, **p, prompt_tokens=seen, semantics="transformers")
    tokens = ts.sample(x, **p, prompt_tokens=seen, seed=seed, semantics="transformers").tokens
    cuts = [
        Cuts(
            np.where(np.isfinite(row), row, -np.float32(3e38)),
            np.isfinite(row),
            p["top_p"],
            p["min_p"],
            BANDS[vocab_size],
        )
        for row in by_top_k
    ]
    return expect_same_rows(ours, theirs, cuts, tokens, seed, p), ROWS


def test_kept_sets_values_and_draws_are_those_of_transformers():
    counts = np.sum([check(p, SMALL, seed) for seed, p in enumerate(PARAMETERS)], axis=0)
    assert counts[0] > 0.7 * counts[1], "of the others a tie at top-p's boundary leaves open what is kept"


@pytest.mark.parametrize("number", [5, 47, 77, 107])
def test_kept_sets_values_and_draws_of_a_real_vocabulary_are_those_of_transformers(number):
    check(PARAMETERS[number], LARGE, number)


def test_temperature_zero_is_greedy_and_any_other_is_not():
    x = np.array([[1.0, 1.0, 0.5]], np.float32)
    assert ts.sample(np.repeat(x, 9, 0), temperature=0, semantics="transformers").tokens.tolist() == [0] * 9
    drawn = ts.sample(
        np.repeat(x, 60, 0), temperature=1e-6, semantics="transformers", position=np.arange(60), seed=1
    )
    assert set(drawn.tokens.tolist()) == {0, 1}


def test_frequency_and_presence_penalties_come_behind_the_repetition_penalty():
    """transformers has none: they are applied in our place."""
    out = ts.apply_logits(
        np.array([[4.0, 1.0]], np.float32),
        repetition_penalty=2.0,
        frequency_penalty=0.25,
        presence_penalty=0.5,
        output_tokens=[[0, 0]],
        temperature=0.5,
        semantics="transformers",
    )
    assert out.tolist() == [[(2.0 - 0.5 - 0.5) / 0.5, 2.0]]
