"""Every code of a one-byte cache, through the kernel's tensor cores and without them: its value, exactly."""

import numpy as np
import pytest
from attention_cases import array_of, numbers, torch
from device_arrays import moved

import tokenstep as ts
from tokenstep.reference import quantised

CODES = np.arange(256, dtype=np.uint8)
ROW_DTYPES = ("float32", "float16", "bfloat16")


def cache_of(codes, dtype):
    """Blocks of one token and one head: uint8 ``[n, D]`` as a cache of this dtype ``[n, 1, 1, D]``."""
    if dtype == "int8":
        return torch.from_numpy(codes.view(np.int8))[:, None, None]
    return torch.from_numpy(codes).view(torch.float8_e4m3fn)[:, None, None]


def attend(device, q, k_codes, v_codes, dtype):
    """Query n over the one token n, scale 1: ``out [n, D]`` and ``lse [n]`` in float64."""
    n = len(q)
    scales = torch.ones(1)
    arguments = {
        "q": torch.as_tensor(q[:, None]),
        "k_cache": cache_of(k_codes, dtype),
        "v_cache": cache_of(v_codes, dtype),
        "block_table": torch.arange(n, dtype=torch.int32)[:, None],
        "seq_lens": torch.ones(n, dtype=torch.int32),
        "k_scale": scales,
        "v_scale": scales.clone(),
    }
    with device.active():
        out, lse = ts.paged_attention(
            **{name: moved(device, a) for name, a in arguments.items()}, scale=1.0, return_lse=True
        )
    return numbers(out.cpu())[:, 0], numbers(lse.cpu())[:, 0]


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
@pytest.mark.parametrize("rows", ROW_DTYPES)
def test_a_value_of_every_code_is_returned_as_it_is(device, rows, dtype):
    values = np.stack([np.roll(CODES, shift) for shift in (0, 1, 7, 100)])
    q, _ = array_of(np.zeros((len(values), 256), np.float32), rows)
    out, _ = attend(device, q, np.zeros_like(values), values, dtype)
    np.testing.assert_array_equal(out, quantised.decode(values, dtype))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
@pytest.mark.parametrize("rows", ROW_DTYPES)
def test_a_key_of_every_code_in_every_dimension_scores_its_value(device, rows, dtype):
    """A query that is 1 in one dimension, over keys that hold NaN or the largest code nowhere else."""
    dims = np.arange(256) % 64
    keys = np.zeros((256, 64), np.uint8)
    keys[CODES, dims] = CODES
    q, _ = array_of(np.eye(64, dtype=np.float32)[dims], rows)
    _, lse = attend(device, q, keys, np.zeros_like(keys), dtype)
    np.testing.assert_allclose(lse, quantised.decode(CODES, dtype), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
def test_dimensions_of_keys_and_queries_meet(device, dtype):
    """Each dimension of a query counts for the same one of its key alone."""
    keys = np.repeat(CODES[None, :64] + np.uint8(1), 64, 0)  # dimension d holds code d + 1
    q, _ = array_of(np.eye(64, dtype=np.float32), "bfloat16")
    _, lse = attend(device, q, keys, np.zeros_like(keys), dtype)
    np.testing.assert_allclose(lse, quantised.decode(keys[0], dtype), rtol=1e-6)
