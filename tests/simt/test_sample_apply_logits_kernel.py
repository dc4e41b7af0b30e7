"""apply_logits() on the device: the CPU's bits, into new arrays, strided ones, and in place."""

import numpy as np
import pytest
from sample_cases import DTYPES, random_case
from sample_device import GEOMETRIES, apply_logits, as_numpy, editing, on_device

from tokenstep import sampling as ts

every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"{g[0]}{g[1]}")


def same_bits(a, b):
    return np.array_equal(a.view(np.int32), b.view(np.int32))


def expected(case):
    return np.asarray(ts.apply_logits(case.logits, check=False, **editing(case.arguments)))


@pytest.mark.parametrize("dtype", DTYPES)
@every_geometry
def test_processed_logits_equal_the_cpu(device, geometry, dtype):
    pytest.importorskip("torch")
    for i, vocab_size in enumerate((1, 7, 33, 257, 1000, 4099)):
        device.use(geometry, seed=i)
        case = random_case(np.random.default_rng([40, i]), dtype, vocab_size, 4)
        got = apply_logits(device, case.logits, case.arguments)
        assert got.dtype == np.float32
        assert same_bits(got, expected(case)), f"vocabulary of {vocab_size}"


@every_geometry
def test_float32_logits_are_processed_in_place(device, geometry):
    for i, vocab_size in enumerate((1, 33, 1000, 4099)):
        device.use(geometry, seed=i)
        case = random_case(np.random.default_rng([41, i]), "float32", vocab_size, 4)
        rows = device.array(case.logits)
        with device.active():
            result = ts.apply_logits(
                rows, check=False, out=rows, **on_device(device, editing(case.arguments))
            )
        assert result is rows
        assert same_bits(as_numpy(rows), expected(case)), f"vocabulary of {vocab_size}"


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_strided_out_is_written_only_where_its_rows_lie(device, offset):
    case = random_case(np.random.default_rng([42, offset]), "float32", 300, 5)
    memory = device.array(np.full((11, 320), 7, np.float32))
    view = memory[1::2, offset : offset + 300]
    device.use(("cluster", 2))
    apply_logits(device, case.logits, case.arguments, out=view)
    got = as_numpy(memory).copy()
    assert same_bits(got[1::2, offset : offset + 300].copy(), expected(case))
    got[1::2, offset : offset + 300] = 7
    assert (got == 7).all()


def test_a_bad_row_is_all_minus_infinity_and_its_neighbours_are_not(device):
    logits = np.zeros((4, 100), np.float32)
    logits[1, 3], logits[2] = np.nan, -np.inf
    temperature = device.array(np.array([1, 1, 1, -1], np.float32))
    out = apply_logits(device, logits, {"temperature": temperature, "logit_bias": {5: 1.0}})
    assert (out[1:] == -np.inf).all()
    assert out[0].tolist() == [0.0] * 5 + [1.0] + [0.0] * 94
