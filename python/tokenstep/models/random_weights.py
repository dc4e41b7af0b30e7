"""Random weights of a model's shape, for measuring its speed and memory where its files aren't there."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenstep.models.config import ModelConfig


class RandomWeights:
    """A TensorSource without files: any tensor of any shape, the same numbers for the same name and device.

    Matrices are normal with a deviation of 1/√columns, so that no layer grows what it gets; biases are 0,
    norm weights 1.
    """

    source = "random weights"

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """See TensorSource: everything is there."""

    def read_into(self, name: str, target: Tensor) -> None:
        """See TensorSource."""
        if target.dim() > 1:
            generator = torch.Generator(target.device).manual_seed(zlib.crc32(name.encode()))
            target.normal_(0.0, target.shape[-1] ** -0.5, generator=generator)
        else:
            target.fill_(1.0 if name.endswith("norm") else 0.0)

    def form(self, name: str) -> None:
        """See TensorSource: no matrix is quantised."""
        return

    def raw(self, name: str) -> NDArray[Any]:
        """See TensorSource."""
        raise NotImplementedError(name)  # no tensor has a form

    def release(self, name: str) -> None:
        """See TensorSource: there is nothing to let go."""

    def kv_scales(self, config: ModelConfig, device: torch.device) -> None:
        """See TensorSource."""
        return

    def unexpected(self) -> Iterable[str]:
        """See TensorSource."""
        return ()


def random_weights_id(config: ModelConfig) -> str:
    """Names them, since the shape decides them all."""
    return f"random{zlib.crc32(repr(config).encode()):08x}"
