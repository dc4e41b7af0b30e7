"""The dense pieces of the decoder: a projection and a norm. Everything dense goes through `Linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear:
    """y = x Wᵀ + b, optionally with a residual added in the same call.

    Args:
        weight: [out, in].
        bias: [out] or None.
    """

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] to [T, out]."""
        return F.linear(x, self.weight, self.bias)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Residual [T, out] + the projection of x [T, in], a new tensor."""
        return torch.add(residual, F.linear(x, self.weight, self.bias))


class RMSNorm:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, computed in float32.

    The weight stays float32 unless `dtype` holds all its values exactly; then it takes that dtype, for which
    torch has a fused kernel.
    """

    __slots__ = ("_fused", "_shape", "eps", "weight")

    def __init__(self, weight: Tensor, eps: float, dtype: torch.dtype) -> None:
        narrow = weight.to(dtype)
        self._fused = torch.equal(narrow.float(), weight.float())
        self.weight = narrow if self._fused else weight.float()
        self.eps = eps
        self._shape = (weight.shape[-1],)

    def __call__(self, x: Tensor) -> Tensor:
        """[…, size] to the same shape and dtype."""
        if self._fused:
            return F.rms_norm(x, self._shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self._shape, self.weight, self.eps).to(x.dtype)


class HeadNorm:
    """RMSNorm of each head on its own, with a weight for each head. weight [heads, head_dim]."""

    __slots__ = ("eps", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """[T, heads, head_dim] to the same shape and dtype."""
        normed = F.rms_norm(x.float(), (x.shape[-1],), None, self.eps)
        return (normed * self.weight).to(x.dtype)
