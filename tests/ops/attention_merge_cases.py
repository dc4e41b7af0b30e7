"""Parts to merge, for the tests of merge_attention."""

import numpy as np
from attention_cases import keep_strides, rounded, torch


def random_parts(dtype, shape=(5, 7, 3, 40), seed=1, spread=3.0):
    """Outputs and log-sum-exps of parts, some of them without keys."""
    rng = np.random.default_rng(seed)
    outs = rounded(rng, shape, dtype)
    lses = (rng.standard_normal(shape[:3]) * spread).astype(np.float32)
    lses[rng.random(lses.shape) < 0.3] = -np.inf
    return outs, lses


def arguments(outs, lses, dtype):
    outs = keep_strides(outs, dtype)
    return outs, torch.from_numpy(lses) if isinstance(outs, torch.Tensor) else lses
