"""Random batches against the reference: the same tokens, status, ranks, ids and bits of log probabilities."""

import numpy as np
import pytest
from sample_cases import DTYPES, assert_same, random_case, supported_isas

from tokenstep import _native
from tokenstep import sampling as ts

# vocabulary size: rows of the default run, rows of the full run. Together more than 100,000 rows.
ROWS = {
    1: (96, 2000), 2: (96, 4000), 3: (96, 3000), 31: (192, 9000), 32: (96, 6000), 33: (192, 9000),
    64: (96, 7000), 100: (192, 10000), 255: (384, 14000), 256: (192, 8000), 257: (384, 14000),
    511: (96, 4000), 1000: (384, 10000), 4099: (96, 1600), 12345: (32, 300), 32003: (16, 150),
    49152: (16, 120), 128256: (16, 100), 151936: (0, 60), 1 << 18: (2, 24),
}  # fmt: skip


def check_rows(vocab_size, num_rows, seed):
    isas = supported_isas()
    rng = np.random.default_rng([seed, vocab_size])
    batch = max(2, min(64, 400_000 // vocab_size))
    done = 0
    while done < num_rows:
        dtype = DTYPES[int(rng.integers(3))]
        case = random_case(rng, dtype, vocab_size, batch)
        want = case.expected()
        for isa in isas:
            _native.cpu.set_isa(isa)
            _native.cpu.set_num_threads(int(rng.integers(1, 4)))
            got = ts.sample(case.logits, check=False, **case.arguments)
            assert_same(got, want, f"V={vocab_size} {dtype} {isa} after {done} rows:")
        done += batch


@pytest.fixture(autouse=True)
def _needs_torch():
    pytest.importorskip("torch")  # holds bfloat16


@pytest.mark.parametrize("vocab_size", [v for v, (rows, _) in ROWS.items() if rows])
def test_random_rows_equal_the_reference_on_every_instruction_set(vocab_size):
    check_rows(vocab_size, ROWS[vocab_size][0], seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", ROWS)
def test_a_hundred_thousand_random_rows_equal_the_reference_on_every_instruction_set(vocab_size):
    assert sum(rows for _, rows in ROWS.values()) > 100_000
    check_rows(vocab_size, ROWS[vocab_size][1], seed=2)
