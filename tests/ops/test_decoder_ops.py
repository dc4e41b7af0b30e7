"""The operations between matrix products: within rounding of float64, and the same bits in any company."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenstep._native import cpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 7, 64, 100, 576, 1537]
EPS = 1e-5
ISAS = ["portable", "avx2", "avx512", "avx512_bf16"]


def rows(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def use(isa: str) -> None:
    try:
        cpu.set_isa(isa)
    except ValueError:
        pytest.skip(f"this CPU has no {isa}")


def assert_rounded_once(ours: Tensor, expected: Tensor, relative: float) -> None:
    """Within half a unit in the last place of the dtype, and `relative` of float32's arithmetic."""
    limits = torch.finfo(ours.dtype)
    allowed = (
        expected.abs() * (limits.eps / 2 + relative) + limits.smallest_normal * limits.eps / 2 + 2e-36
    )  # below 2^-126 e^-z is 0
    assert ((ours.double() - expected).abs() <= allowed).all()


def normed(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def gated(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.double().chunk(2, 1)
    inner = 0.7978845608028654 * (gate + 0.044715 * gate**3)
    # gelu's 0.5 x (1 + tanh(u)) is x sigmoid(2 u): in this form float64 doesn't cancel
    return gate * torch.sigmoid(gate if activation == "silu" else 2 * inner) * up


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_is_that_of_float64_rounded_once(isa: str, dtype: torch.dtype) -> None:
    use(isa)
    for size, weight_dtype in itertools.product(SIZES, {torch.float32, dtype}):
        x, weight = rows((5, size), dtype), rows((size,), weight_dtype)
        x[1] = 0.0
        x[2] = 30000.0  # its square is beyond float16
        assert_rounded_once(cpu.rms_norm(x, weight, EPS), normed(x, weight), 4e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_normed_one_by_one_in_any_strides(dtype: torch.dtype) -> None:
    x, weight = rows((6, 9, 40), dtype)[:, 2:7], rows((5, 40), torch.float32)
    assert_rounded_once(cpu.rms_norm(x, weight, EPS), normed(x, weight), 4e-7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gate_is_that_of_float64_rounded_once(isa: str, dtype: torch.dtype, activation: str) -> None:
    use(isa)
    for size in SIZES:
        gate_up = rows((4, 2 * size), dtype)
        gate_up[1] = torch.linspace(-12, 12, 2 * size).to(dtype)
        # the exponent of e^-z has the rounding of z, which is up to 12 for silu and 87 for gelu, cubed there
        relative = 2e-6 if activation == "silu" else 2e-5
        assert_rounded_once(cpu.gate(gate_up, activation), gated(gate_up, activation), relative)


def test_a_gate_of_extreme_numbers_is_finite_or_what_float64_says() -> None:
    gate_up = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 1e30, float("nan")] + [1.0] * 7])
    silu, gelu = cpu.gate(gate_up, "silu")[0], cpu.gate(gate_up, "gelu_tanh")[0]
    assert silu[:6].tolist() == pytest.approx(
        [0.0, 0.0, -88 * 6.05e-39, 0.0, 88.0, 1e30], rel=1e-5, abs=1e-36
    )
    assert gelu[:6].tolist() == pytest.approx([0.0, 0.0, 0.0, 0.0, 88.0, 1e30])
    assert silu[6].isnan()
    assert gelu[6].isnan()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_soft_cap_is_that_of_float64_in_place(isa: str, dtype: torch.dtype) -> None:
    use(isa)
    for size in SIZES:
        x = rows((4, size + 3), dtype, 40.0)
        whole = x.clone()
        cpu.soft_cap(x[:, :size], 30.0)
        expected = 30.0 * torch.tanh(whole[:, :size].double() / 30.0)
        assert_rounded_once(x[:, :size], expected, 1e-6)
        assert torch.equal(x[:, size:], whole[:, size:])


def soft_capped(x: Tensor) -> Tensor:
    x = x.clone()
    cpu.soft_cap(x, 5.0)
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [96, 99, 1000, 40000])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: cpu.rms_norm(x, torch.ones(x.shape[1]), EPS),
        lambda x: cpu.gate(x[:, : x.shape[1] // 2 * 2], "silu"),
        lambda x: cpu.gate(x[:, : x.shape[1] // 2 * 2], "gelu_tanh"),
        soft_capped,
    ],
    ids=["norm", "silu", "gelu", "soft cap"],
)
def test_a_row_has_the_same_bits_alone_and_in_any_batch_on_any_threads(
    function: Callable[[Tensor], Tensor], size: int, dtype: torch.dtype
) -> None:
    x = rows((150 if size < 10000 else 6, size), dtype)
    cpu.set_num_threads(1)
    expected = torch.cat([function(x[i : i + 1]) for i in range(len(x))])
    for count, threads in ((2, 1), (len(x) // 7 + 1, 2), (len(x), 1), (len(x), 3)):
        cpu.set_num_threads(threads)
        assert torch.equal(function(x[:count]), expected[:count])


def test_norms_have_the_same_bits_on_all_sets_that_fuse_products() -> None:
    x, weight = rows((3, 1537), torch.float32), rows((1537,), torch.float32)
    results = []
    for isa in ISAS[1:]:
        use(isa)
        results.append(cpu.rms_norm(x, weight, EPS))
    assert all(torch.equal(result, results[0]) for result in results)


def test_batches_without_rows_give_none() -> None:
    assert cpu.rms_norm(torch.empty(0, 8), torch.ones(8), EPS).shape == (0, 8)
    assert cpu.gate(torch.empty(0, 8), "silu").shape == (0, 4)
    cpu.soft_cap(torch.empty(0, 8), 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cpu.rms_norm(torch.ones(8), torch.ones(8), EPS), "x has shape .8., expected .T, size."),
        (lambda: cpu.rms_norm(torch.ones(2, 8), torch.ones(7), EPS), r"weight has shape \[7\]"),
        (lambda: cpu.rms_norm(torch.ones(2, 8).half(), torch.ones(8).bfloat16(), EPS), "weight has dtype"),
        (lambda: cpu.rms_norm(torch.ones(8, 2).T, torch.ones(8), EPS), "x has stride 2"),
        (lambda: cpu.rms_norm(torch.ones(2, 8, dtype=torch.int64), torch.ones(8), EPS), "x has dtype int64"),
        (
            lambda: cpu.gate(torch.ones(2, 7), "silu"),
            r"gate_up has shape \[2, 7\], expected \[T, 2 \* size\]",
        ),
        (lambda: cpu.gate(torch.ones(2, 8), "relu"), "activation = 'relu', expected silu or gelu_tanh"),
        (lambda: cpu.soft_cap(torch.ones(2, 8), 0.0), "cap = 0, expected cap > 0"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
