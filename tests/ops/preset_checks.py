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


def uniform_of(seed, position):
    """The number in [0, 1) that sample draws by."""
    return random_bits(seed, position, 0) / 2.0**64


def expect_same_token(token, probabilities, uniform, band, where):
    """The token is where the running sum of their probabilities, by ascending id, exceeds the draw."""
    running = np.cumsum(np.asarray(probabilities, np.float64))
    running /= running[-1]
    first, last = np.searchsorted(running, [uniform - band, uniform + band], side="right")
    theirs = np.searchsorted(running, uniform, side="right")
    assert token == theirs or first <= token <= last, f"{where}: drew {token}, they would draw {theirs}"
    return token == theirs


def ulps(a, b):
    """Distance of float32 numbers in units in the last place."""
    a, b = (np.asarray(v, np.float32).view(np.int32).astype(np.int64) for v in (a, b))
    a, b = (np.where(v < 0, -(v & 0x7FFFFFFF), v) for v in (a, b))
    return np.abs(a - b)
