"""Rotary position embedding: the tables of cos and sin, with the published ways to stretch the context.

Linear: Chen et al., arXiv 2306.15595. YaRN: Peng et al., arXiv 2309.00071. llama3: the frequency bands of
Llama 3.1's model card. All is done in float32 in the order in which the checkpoints were trained, so that
logits agree with other implementations at high positions too (a float64 angle at position 100,000 differs by
0.004).
"""

from __future__ import annotations

import math

import torch

from tokenstep.attention import Rope
from tokenstep.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position for each pair of dimensions, float32 [head_dim/2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = rope.theta**exponents  # in positions per radian
    plain = 1.0 / wavelengths
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "factors":
        return plain / torch.tensor(rope.frequency_factors, dtype=torch.float32)
    if rope.kind == "llama3":
        return _stretch_low_bands(plain, rope)
    if rope.kind == "yarn":
        stretched = 1.0 / (rope.factor * wavelengths)
        kept = 1.0 - _yarn_ramp(rope, head_dim)
        return stretched * (1.0 - kept) + plain * kept
    return plain


def build_rope(
    rope: RopeConfig, head_dim: int, max_position: int, device: torch.device | str = "cpu"
) -> Rope:
    """Tables for positions 0 … max_position − 1: cos and sin, float32 [max_position, head_dim/2]."""
    positions = torch.arange(max_position, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(rope, head_dim))
    cos, sin = angles.cos(), angles.sin()
    if rope.attention_factor != 1.0:
        cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
    return Rope(cos.to(device), sin.to(device))


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature, as a factor on cos and sin."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _stretch_low_bands(plain: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Waves longer than the original context are stretched, short ones kept, those between interpolated."""
    turns = rope.original_max_position * plain / (2 * math.pi)  # full turns within the original context
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1.0 - kept) * plain / rope.factor + kept * plain


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """0 where a dimension turns often enough to be kept, 1 where it is stretched, float32 [head_dim/2]."""

    def dimension(turns: float) -> float:
        ratio = rope.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
