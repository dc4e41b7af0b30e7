"""Products with packed bfloat16 weights: within rounding of float64, the same bits in any company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenstep._native import cpu
from tokenstep.models import packed_linear
from tokenstep.models.memory import HugePages
from tokenstep.models.packed_linear import MATRIX_UNIT_ROWS, PackedLinear, PackedWeight

ISAS = ["portable", "avx2", "avx512", "avx512_bf16"]


def use(isa: str) -> None:
    try:
        cpu.set_isa(isa)
    except ValueError:
        pytest.skip(f"this CPU has no {isa}")


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def packed(weight: Tensor) -> PackedWeight:
    matrix = PackedWeight("bfloat16", *weight.shape, torch.bfloat16, HugePages())
    matrix.pack(weight.view(torch.uint8))
    return matrix


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("outputs", [1, 16, 40, 100, 333])
@pytest.mark.parametrize("inputs", [32, 576])
def test_a_product_is_that_of_float64_rounded_once(isa: str, outputs: int, inputs: int) -> None:
    use(isa)
    weight, bias = numbers(outputs, inputs), numbers(outputs)
    matrix = packed(weight)
    for rows in (1, 2, 5, 8, 9, 17, 33):
        x, residual = numbers(rows, inputs), numbers(rows, outputs)
        exact = x.double() @ weight.double().T + bias.double() + residual.double()
        size = x.double().abs() @ weight.double().abs().T + bias.double().abs() + residual.double().abs()
        ours = matrix.project(x, bias, residual).double()
        # half a unit of bfloat16, and float32's sums: a rounding a pair of columns
        assert ((ours - exact).abs() <= exact.abs() / 256 + size * inputs * 2**-25).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("outputs", [48, 200, 1040])
def test_a_row_has_the_same_bits_beside_any_others_on_any_threads(isa: str, outputs: int) -> None:
    use(isa)
    matrix, x = packed(numbers(outputs, 96)), numbers(70, 96)
    cpu.set_num_threads(1)
    alone = torch.cat([matrix.project(x[i : i + 1], None, None) for i in range(len(x))])
    for rows in (*range(2, 20), 31, 32, 33, 70):
        for threads in (1, 3):
            cpu.set_num_threads(threads)
            assert torch.equal(matrix.project(x[:rows], None, None), alone[:rows])
    assert torch.equal(matrix.project(x[1::2], None, None), alone[1::2])


def test_rows_may_be_part_of_a_wider_array() -> None:
    matrix, wide = packed(numbers(64, 64)), numbers(12, 200)
    x = wide[:, 8:72]
    assert torch.equal(matrix.project(x, None, None), matrix.project(x.contiguous(), None, None))


def test_with_matrix_units_torch_multiplies_many_rows_unless_bits_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, bias = numbers(48, 64), numbers(48)
    torchs = torch.nn.functional.linear
    calls: list[int] = []

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(len(x))
        return torchs(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    monkeypatch.setattr(packed_linear, "has_matrix_units", lambda: True)
    linear = PackedLinear(packed(weight), bias)
    invariant = linear.as_batch_invariant()
    x, residual = numbers(MATRIX_UNIT_ROWS, 64), numbers(MATRIX_UNIT_ROWS, 48)
    assert torch.equal(linear(x), torchs(x, weight, bias))
    assert torch.equal(linear.added_to(residual, x), residual + torchs(x, weight, bias))
    assert calls == [MATRIX_UNIT_ROWS] * 2
    linear(x[1:])
    invariant(x)
    invariant.added_to(residual, x)
    assert len(calls) == 2
    assert (linear.form, invariant.form) == ("bfloat16_amx", "bfloat16")
