"""PackedMatrix against float64: every format, on every instruction set of this machine."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

import tokenstep as ts
from tokenstep._native import cpu

FORMS = ("bfloat16", "q4_0", "q4_1", "q8_0")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# whole tiles of 16 rows and others; one block of 32 columns, and several chunks of 8
SHAPES = ((48, 64), (37, 576), (1, 32), (33, 288), (16, 1536))
MOST_ROWS = 210  # more than a panel


def supported_isas() -> list[str]:
    found = []
    for name in ("portable", "avx2", "avx512", "avx512_bf16"):
        try:
            cpu.set_isa(name)
        except ValueError:
            continue
        found.append(name)
    cpu.set_isa("")
    return found


@pytest.fixture(params=supported_isas())
def isa(request: pytest.FixtureRequest) -> Any:
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa("")


@functools.cache
def stored(form: str, rows: int, columns: int) -> tuple[np.ndarray, torch.Tensor]:
    """Bytes as in a file, and the numbers that the gguf package says they are, float64."""
    weights = torch.randn((rows, columns), generator=torch.Generator().manual_seed(rows + columns))
    weights[:, ::7] *= 10
    if form == "bfloat16":
        return weights.bfloat16().view(torch.uint8).numpy(), weights.bfloat16().double()
    kind = GGMLQuantizationType[form.upper()]
    raw = quants.quantize(weights.numpy(), kind)
    return raw, torch.from_numpy(quants.dequantize(raw, kind)).double()


def packed(form: str, rows: int, columns: int) -> Any:
    memory = torch.full((cpu.PackedMatrix.num_bytes_of(form, rows, columns),), 0xFF, dtype=torch.uint8)
    matrix = cpu.PackedMatrix(form, rows, columns, memory)
    matrix.pack(stored(form, rows, columns)[0])
    return matrix


def inputs(count: int, size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn((count, size), generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(matrix: Any, x: torch.Tensor, **added: torch.Tensor) -> torch.Tensor:
    out = torch.full((len(x), matrix.rows), torch.nan, dtype=x.dtype)
    matrix.linear(x, out, **added)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_that_of_the_stored_numbers_summed_in_float32_and_rounded_once(
    isa: str, form: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    rows, columns = shape
    matrix, weights = packed(form, rows, columns), stored(form, rows, columns)[1]
    x, bias, residual = inputs(9, columns, dtype), inputs(1, rows, dtype, 1)[0], inputs(9, rows, dtype, 2)

    ours = product(matrix, x, bias=bias, residual=residual).double()

    expected = x.double() @ weights.T + bias.double() + residual.double()
    # an ulp of float32 for each step of a block's sum, of the sums over blocks, and of what is added
    terms = x.double().abs() @ weights.abs().T + bias.double().abs() + residual.double().abs()
    steps = 32 + columns / 32 + 4
    error = terms * steps * 2**-24 + expected.abs() * torch.finfo(dtype).eps / 2
    assert ((ours - expected).abs() <= error + torch.finfo(dtype).smallest_normal).all()
    assert torch.equal(product(matrix, x), product(matrix, x, bias=torch.zeros(rows, dtype=dtype)))


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_the_numbers_that_the_gguf_package_decodes(form: str) -> None:
    matrix, weights = packed(form, 37, 576), stored(form, 37, 576)[1]
    ids = torch.tensor([36, 0, 17, 17, 5])
    for dtype in DTYPES:
        out = torch.empty((5, 576), dtype=dtype)
        matrix.gather(ids, out)
        assert torch.equal(out, weights[ids].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(isa: str, form: str, dtype: torch.dtype) -> None:
    rows, columns = 37, 576
    matrix = packed(form, rows, columns)
    x = inputs(MOST_ROWS, columns, dtype)
    x[3] = torch.inf
    alone = torch.cat([product(matrix, row[None]) for row in x])
    for count in (*range(2, 20), 31, 64, 192, 193, MOST_ROWS):
        assert same(product(matrix, x[:count]), alone)
    assert same(product(matrix, x[5:100]), alone[5:])


def same(some: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bits; NaN, which a row of infinities may give, is any NaN."""
    return torch.equal(some.nan_to_num(7.25), expected[: len(some)].nan_to_num(7.25))


def test_the_number_of_threads_changes_no_bit() -> None:
    matrix, x = packed("q4_1", 1000, 288), inputs(40, 288, torch.float32)
    threads = ts.get_num_threads()
    expected = product(matrix, x)
    for count in (1, 2, 5):
        ts.set_num_threads(count)
        assert torch.equal(product(matrix, x), expected)
    ts.set_num_threads(threads)


@pytest.mark.parametrize("form", FORMS)
def test_rows_may_be_packed_in_any_pieces(form: str) -> None:
    raw, weights = stored(form, 37, 64)
    memory = torch.empty(cpu.PackedMatrix.num_bytes_of(form, 37, 64), dtype=torch.uint8)
    matrix = cpu.PackedMatrix(form, 37, 64, memory)
    for first, end in ((20, 37), (0, 3), (3, 20)):
        matrix.pack(np.ascontiguousarray(raw[first:end]), first)
    out = torch.empty((37, 64))
    matrix.gather(torch.arange(37), out)
    assert torch.equal(out.double(), weights)


@pytest.mark.parametrize("form", ["q4_0", "q4_1", "q8_0"])
def test_extreme_integers_and_scales_are_exact(isa: str, form: str) -> None:
    """All integers, -128 too, with scales from subnormal to large: a one picks out each number."""
    kind = GGMLQuantizationType[form.upper()]
    raw = quants.quantize(np.zeros((16, 32), np.float32), kind)
    header = 4 if form == "q4_1" else 2
    raw[:, :2] = np.float16([2.0**-24, 6e-5, 1, -3.3, 60000, 0.1, -0.0, 7] * 2).view(np.uint8).reshape(16, 2)
    if form == "q4_1":
        raw[:, 2:4] = np.float16([-1.5]).view(np.uint8)
    raw[:, header:] = np.arange(16 * (raw.shape[1] - header)).reshape(16, -1).astype(np.uint8)
    if form == "q8_0":
        raw[:, header] = 0x80
    matrix = cpu.PackedMatrix(
        form, 16, 32, torch.empty(cpu.PackedMatrix.num_bytes_of(form, 16, 32), dtype=torch.uint8)
    )
    matrix.pack(raw)
    expected = torch.from_numpy(quants.dequantize(raw, kind)).T
    assert torch.equal(product(matrix, torch.eye(32)), expected)
    assert torch.equal(product(matrix, torch.eye(32, dtype=torch.bfloat16)), expected.bfloat16())


def test_x_and_the_residual_may_have_strides_and_the_result_may_take_the_residuals_place() -> None:
    matrix = packed("q4_1", 48, 64)
    wide, residual = inputs(7, 100, torch.float32), inputs(7, 60, torch.float32, 1)
    x = wide[:, 10:74]
    expected = product(matrix, x.contiguous(), residual=residual[:, :48].contiguous())
    assert torch.equal(product(matrix, x, residual=residual[:, :48]), expected)
    place = residual[:, :48].contiguous()
    matrix.linear(x, place, residual=place)
    assert torch.equal(place, expected)


def test_no_rows_are_no_work() -> None:
    matrix = packed("q8_0", 48, 64)
    assert product(matrix, torch.empty(0, 64)).shape == (0, 48)
    matrix.gather(torch.empty(0, dtype=torch.int64), torch.empty(0, 64))


def memory(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8)


X, OUT, RAW = torch.zeros(2, 64), torch.zeros(2, 48), np.zeros((2, 68), np.uint8)
MISTAKES: dict[str, tuple[type[Exception], Any]] = {
    "PackedMatrix: format = 'q5_0', expected bfloat16, q4_0, q4_1 or q8_0": (
        ValueError, lambda m: cpu.PackedMatrix("q5_0", 16, 32, memory(16 * 22)),
    ),
    "PackedMatrix: rows = 0, expected 1 ≤ rows": (
        ValueError, lambda m: cpu.PackedMatrix("q8_0", 0, 32, memory(0)),
    ),
    "PackedMatrix: columns = 48, expected a multiple of 32": (
        ValueError, lambda m: cpu.PackedMatrix("q8_0", 16, 48, memory(544)),
    ),
    "PackedMatrix: memory has shape [543], expected [544]": (
        ValueError, lambda m: cpu.PackedMatrix("q8_0", 16, 32, memory(543)),
    ),
    "PackedMatrix: memory begins at an address that is no multiple of 64": (
        ValueError, lambda m: cpu.PackedMatrix("q8_0", 16, 32, memory(552)[8:]),
    ),
    "PackedMatrix.pack: source has shape [2, 67], expected [any, 68]": (
        ValueError, lambda m: m.pack(np.zeros((2, 67), np.uint8)),
    ),
    "PackedMatrix.pack: source has dtype int8, expected uint8": (
        TypeError, lambda m: m.pack(RAW.view(np.int8)),
    ),
    "PackedMatrix.pack: first_row = 47, expected 2 rows within the 48 of the matrix": (
        ValueError, lambda m: m.pack(RAW, 47),
    ),
    "PackedMatrix.pack: first_row = -1,": (ValueError, lambda m: m.pack(RAW, -1)),
    "PackedMatrix.gather: rows[1] = 48, expected 0 ≤ row < 48": (
        ValueError, lambda m: m.gather(torch.tensor([0, 48]), X),
    ),
    "PackedMatrix.gather: rows[0] = -1, expected 0 ≤ row < 48": (
        ValueError, lambda m: m.gather(torch.tensor([-1, 4]), X),
    ),
    "PackedMatrix.linear: x has shape [2, 32], expected [any, 64]": (
        ValueError, lambda m: m.linear(X[:, :32], OUT),
    ),
    "PackedMatrix.linear: x has dtype float64,": (TypeError, lambda m: m.linear(X.double(), OUT)),
    "PackedMatrix.linear: out has dtype bfloat16, expected float32": (
        TypeError, lambda m: m.linear(X, OUT.bfloat16()),
    ),
    "PackedMatrix.linear: out has shape [1, 48], expected [2, 48]": (
        ValueError, lambda m: m.linear(X, OUT[:1]),
    ),
    "PackedMatrix.linear: bias has shape [47], expected [48]": (
        ValueError, lambda m: m.linear(X, OUT, bias=torch.zeros(47)),
    ),
    "PackedMatrix.linear: residual has shape [3, 48], expected [2, 48]": (
        ValueError, lambda m: m.linear(X, OUT, residual=torch.zeros(3, 48)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_named(message: str) -> None:
    error, call = MISTAKES[message]
    with pytest.raises(error, match=re.escape(f"tokenstep.{message}")):
        call(packed("q8_0", 48, 64))
