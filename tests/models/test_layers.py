"""Norms and projections on their own, against float64."""

from __future__ import annotations

import pytest
import torch

from tokenstep.models.layers import TILE_ROWS, HeadNorm, Linear, RMSNorm, round_rows

EPS = 1e-5


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def assert_rounded_once(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Within half a unit in the last place, and what float32 leaves of the mean."""
    limits = torch.finfo(ours.dtype)
    allowed = expected.abs() * (limits.eps / 2 + 4e-7) + limits.smallest_normal * limits.eps / 2
    assert ((ours.double() - expected).abs() <= allowed + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("exact", [True, False], ids=["weight of that dtype", "float32 weight"])
@pytest.mark.parametrize("size", [64, 576, 4096])
def test_a_norm_is_rounded_once(dtype: torch.dtype, exact: bool, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x = (torch.randn(9, size, generator=generator) * 100).to(dtype)
    x[3] = 30000.0  # its square is beyond float16
    x[4] = 0.0
    weight = torch.randn(size, generator=generator)
    weight = weight.to(dtype).float() if exact else weight + 1e-6
    norm = RMSNorm(weight, EPS, dtype)

    assert norm(x).dtype == dtype
    assert (norm.weight.dtype == dtype) is (exact or dtype == torch.float32)
    assert_rounded_once(norm(x), normed(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_heads_are_normed_one_by_one_each_with_its_weight(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(7, 5, 24, generator=generator).to(dtype), torch.randn(5, 24, generator=generator)

    ours = HeadNorm(weight, EPS)(x)

    assert ours.dtype == dtype
    assert_rounded_once(ours, normed(x, weight))


def test_a_projection_leaves_the_residual_untouched() -> None:
    x, residual = torch.randn(3, 8), torch.randn(3, 4)
    linear = Linear(torch.randn(4, 8), torch.randn(4))
    before = residual.clone()

    added = linear.added_to(residual, x)

    assert torch.equal(added, residual + linear(x))
    assert torch.equal(residual, before)


def test_batches_of_any_size_make_products_of_few() -> None:
    counts = range(1, 4097)
    rounded = [round_rows(rows) for rows in counts]
    assert all(rows <= up <= max(TILE_ROWS, rows * 9 / 8) for rows, up in zip(counts, rounded, strict=True))
    assert rounded[:TILE_ROWS] == list(range(1, TILE_ROWS + 1)), "decoding pays nothing"
    assert len(set(rounded)) <= TILE_ROWS + 8 * 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 32, 33, 71, 130])
def test_a_product_has_the_rows_that_went_in(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    linear = torch.nn.functional.linear

    def counted(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        made.append(len(x))
        return linear(x, *others)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    x, weight, bias = (
        torch.randn(rows, 64).to(dtype),
        torch.randn(40, 64).to(dtype),
        torch.randn(40).to(dtype),
    )
    y = Linear(weight, bias)(x)
    assert made == [round_rows(rows)]
    assert (y.shape, y.dtype) == ((rows, 40), dtype)
    expected = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0.05)
