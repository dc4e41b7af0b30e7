"""Holding apply_logits and sample to another engine's own operations, row by row.

Engines add up float32 probabilities where the kernels add integers, so that a token may be kept by one alone
where its boundary is within rounding: tokens for which that is so are told by float64 arithmetic (`band` for
top-p's share, RATIO_BAND for min-p's), everything else must be equal. Which of several equal values stay at
top-p's boundary, or at the k-th place where exactly k are kept, no engine promises: their number must agree.
"""

from dataclasses import dataclass

import numpy as np

from tokenstep.reference.numerics import random_bits

RATIO_BAND = 4e-6  # of min-p, in units of the logit
SMALL, LARGE = 500, 20011  # vocabularies
BANDS = {SMALL: 2e-6, LARGE: 2e-5}  # of float32 sums over so many tokens


def tied_logits(seed, num_rows, vocab_size):
    """Rows from flat to peaked; of every second one the values are coarse, so that many are equal."""
    rng = np.random.default_rng([60, seed])
    x = rng.standard_normal((num_rows, vocab_size)) * rng.uniform(0.3, 5, (num_rows, 1))
    x[::2] = np.round(x[::2] * 8) / 8
    return x.astype(np.float32)


def histories(seed, num_rows, vocab_size, most=100):
    """Token ids with repetitions, a list a row."""
    rng = np.random.default_rng([61, seed])
    pools = rng.integers(0, vocab_size, (num_rows, 30))
    return [rng.choice(pool, rng.integers(0, most)).tolist() for pool in pools]


@dataclass(frozen=True)
class Cuts:
    """What decides which tokens of a row are kept, as far as float64 can tell.

    ranked [V]: the values by which cuts go; inside [V]: what top-p's share is one of.
    """

    ranked: np.ndarray
    inside: np.ndarray
    top_p: float
    min_p: float
    band: float
    exactly_k: bool = False

    def expect_same(self, ours, theirs, where):
        """Fails if a token is kept by one alone without a reason."""
        different = np.flatnonzero(ours != theirs)
        if not len(different):
            return
        x = self.ranked.astype(np.float64)
        weights = np.where(self.inside, np.exp(x - x.max()), 0.0)
        for value in np.unique(self.ranked[different]):
            group = self.ranked == value
            n_ours, n_theirs = (ours & group).sum(), (theirs & group).sum()
            share = weights[group & self.inside]
            before = weights[self.ranked > value].sum() / weights.sum()
            each = share[:1].sum() / weights.sum()
            edge = (self.top_p - before) / max(each, 1e-300)  # the next whole number of the group stays
            slack = self.band / max(each, 1e-300)
            at_top_p = self.top_p < 1 and all(
                edge - slack <= n <= edge + 1 + slack for n in (n_ours, n_theirs)
            )
            at_min_p = self.min_p > 0 and abs(value - x.max() - np.log(self.min_p)) < RATIO_BAND
            at_kth = self.exactly_k and len(share) < group.sum() and n_ours == n_theirs
            assert at_min_p or at_top_p or at_kth, (
                f"{where}: of {group.sum()} tokens at {value} ours keeps {n_ours}, theirs {n_theirs}; share"
                f" before {before}, top_p {self.top_p}"
            )


def expect_same_rows(ours, theirs, cuts, tokens, seed, what, shares=None):
    """Holds processed logits [B, V], and tokens drawn with ``seed``, to an engine's.

    ``cuts`` has one Cuts a row; ``shares`` [B, V] are the engine's probabilities (None: of its logits).
    Returns for how many rows the token is that of the engine's probabilities with the same uniform number.
    """
    uniform, same = random_bits(seed, 0, 0) / 2.0**64, 0
    for row, (cut, token) in enumerate(zip(cuts, tokens.tolist(), strict=True)):
        where = f"{what}, row {row}"
        kept, by_theirs = np.isfinite(ours[row]), np.isfinite(theirs[row])
        cut.expect_same(kept, by_theirs, where)
        both = kept & by_theirs
        assert np.array_equal(ours[row][both], theirs[row][both]), f"{where}: other values"
        if np.array_equal(kept, by_theirs):
            drawn_from = np.exp(theirs[row].astype(np.float64) - theirs[row].max())
            same += expect_same_token(
                token, drawn_from if shares is None else shares[row], uniform, 1e-6, where
            )
    return same


def expect_same_token(token, probabilities, uniform, band, where):
    """The token is where the running sum of their probabilities, by ascending id, exceeds the draw."""
    running = np.cumsum(np.asarray(probabilities, np.float64))
    running /= running[-1]
    first, last = np.searchsorted(running, [uniform - band, uniform + band], side="right")
    theirs = np.searchsorted(running, uniform, side="right")
    assert token == theirs or first <= token <= last, f"{where}: drew {token}, they would draw {theirs}"
    return int(token == theirs)
