"""LoRA adapters (Hu et al., arXiv 2106.09685): y = x Wᵀ + scale · (x Aᵀ) Bᵀ, with other A and B row by row.

The weights stay as they are. A step whose rows belong to several adapters, or to none, computes the model's
products for all of them at once; then each adapter adds its low-rank product to its own rows. Projections
that the decoder has fused (q, k, v; gate, up) get their updates in the columns that are theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenstep.models.config import ModelConfig
from tokenstep.models.decoder import Layer
from tokenstep.models.layers import Linear, Projection

PRODUCTS = {
    "q": "qkv",
    "k": "qkv",
    "v": "qkv",
    "output": "output",
    "gate": "gate_up",
    "up": "gate_up",
    "down": "down",
}
"""The decoder's product that has each projection; in the order in which they are fused there."""


def projection_shape(config: ModelConfig, name: str) -> tuple[int, int]:
    """Out and in of a projection, by its name in `PRODUCTS`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "q": (config.q_size, hidden),
        "k": (config.kv_size, hidden),
        "v": (config.kv_size, hidden),
        "output": (hidden, config.q_size),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }[name]


@dataclass(frozen=True)
class LowRank:
    """The update of one projection.

    Attributes:
        a: [rank, in].
        b: [out, rank], the scale included.
    """

    a: Tensor
    b: Tensor


class Update:
    """The updates of one product of the decoder: of one projection, or of those that are fused in it.

    Args:
        parts: for each projection its first column in the product, and its update.
        in_tiles: a row's result has the same bits whatever other rows there are, as in `Linear`.
    """

    def __init__(self, parts: Sequence[tuple[int, LowRank]], in_tiles: bool) -> None:
        self._down = Linear(torch.cat([part.a for _, part in parts]), in_tiles=in_tiles)
        self._ranks = [len(part.a) for _, part in parts]
        self._up = [(begin, Linear(part.b, in_tiles=in_tiles)) for begin, part in parts]

    def add_to(self, out: Tensor, x: Tensor, rows: Tensor | None) -> None:
        """Adds to `rows` of out [T, out], in place, what they become of x [T, in]; None: to all rows."""
        inner = self._down(x if rows is None else x.index_select(0, rows))
        for part, (begin, up) in zip(torch.split(inner, self._ranks, 1), self._up, strict=True):
            delta = up(part.contiguous())
            columns = out[:, begin : begin + delta.shape[1]]
            if rows is None:
                columns += delta
            else:
                columns.index_add_(0, rows, delta)


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """An adapter on the model's device.

    Attributes:
        digest: of all that decides its results: what it computes may only be shared with its equals.
        updates: for each layer the products of the decoder that it changes, by their names in `Layer`.
    """

    digest: bytes
    updates: Sequence[Mapping[str, Update]]

    @property
    def id(self) -> str:
        """Twelve hex digits that change with its weights."""
        return self.digest.hex()[:12]


def make_adapter(
    digest: bytes,
    config: ModelConfig,
    projections: Mapping[tuple[int, str], LowRank],
    in_tiles: bool,
) -> LoraAdapter:
    """An adapter from the updates of single projections, by layer and name."""
    layers: list[dict[str, Update]] = []
    for layer in range(config.num_layers):
        parts: dict[str, list[tuple[int, LowRank]]] = {}
        first: dict[str, int] = {}  # the next column of each product
        for name, product in PRODUCTS.items():
            begin = first.get(product, 0)
            first[product] = begin + projection_shape(config, name)[0]
            if (layer, name) in projections:
                parts.setdefault(product, []).append((begin, projections[layer, name]))
        layers.append({product: Update(found, in_tiles) for product, found in parts.items()})
    return LoraAdapter(digest, layers)


class AdaptedLinear:
    """A product of the decoder with the updates of several adapters; in its place for one batch.

    Args:
        base: the model's own product.
        updates: with the rows that each is for.
    """

    __slots__ = ("_base", "_updates")

    def __init__(self, base: Projection, updates: Sequence[tuple[Update, Tensor | None]]) -> None:
        self._base = base
        self._updates = updates

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, in] to [T, out]. `out` is room for the result, which needn't be used."""
        return self._update(self._base(x, out), x)

    def added_to(self, residual: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Residual [T, out] + the projection of x [T, in]: a new tensor, or `out`, even the residual."""
        return self._update(self._base.added_to(residual, x, out), x)

    def _update(self, result: Tensor, x: Tensor) -> Tensor:
        for update, rows in self._updates:
            update.add_to(result, x, rows)
        return result


class AdapterRows:
    """Which rows of a step belong to which adapter.

    Args:
        groups: adapters with the numbers of their rows, int64, in rising order; None: all rows.
    """

    def __init__(self, groups: Sequence[tuple[LoraAdapter, Tensor | None]]) -> None:
        self._groups = groups
        self._layers: list[Layer] | None = None

    @classmethod
    def of(cls, counts: Iterable[tuple[LoraAdapter | None, int]], device: torch.device) -> AdapterRows | None:
        """From the adapter and the number of rows of each sequence, in their order; None without adapters."""
        rows: dict[LoraAdapter, list[int]] = {}
        total = 0
        for adapter, count in counts:
            if adapter is not None:
                rows.setdefault(adapter, []).extend(range(total, total + count))
            total += count
        if not rows:
            return None
        return cls(
            [
                (adapter, None if len(found) == total else torch.tensor(found, device=device))
                for adapter, found in rows.items()
            ]
        )

    def adapt(self, layers: Sequence[Layer]) -> list[Layer]:
        """The model's layers with the adapters in their places; made once for all steps of a batch."""
        if self._layers is None:
            self._layers = [self._adapt(index, layer) for index, layer in enumerate(layers)]
        return self._layers

    def _adapt(self, index: int, layer: Layer) -> Layer:
        updates: dict[str, list[tuple[Update, Tensor | None]]] = {}
        for adapter, rows in self._groups:
            for product, update in adapter.updates[index].items():
                updates.setdefault(product, []).append((update, rows))
        adapted: dict[str, Any] = {
            product: AdaptedLinear(getattr(layer, product), found) for product, found in updates.items()
        }
        return replace(layer, **adapted)
