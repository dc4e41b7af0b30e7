"""What can be wrong with the data of a sequence, and its status."""

import numpy as np
import pytest
from attention_cases import Heads, paged, random_sequence

OK, BAD_BLOCK, BAD_LENGTH = 0, 1, 2
HEADS = Heads(4, 2, 16)
LENGTHS = [(40, 1), (70, 3), (33, 2), (0, 1)]
BAD = 1  # the sequence that is made bad


def batch_of(dtype="float32", lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return paged([random_sequence(rng, dtype, HEADS, n, m) for n, m in lengths], dtype)


def set_length(value):
    def change(arguments):
        arguments["seq_lens"][BAD] = value

    return change


def set_block(column, value):
    def change(arguments):
        arguments["block_table"][BAD, column] = value

    return change


LENGTH, BLOCK = "seq_lens[1] = {}, expected ", "block_table[1, {}] = {}, expected 0 ≤ id < 14"
IN_TABLE = LENGTH + "0 ≤ length ≤ 96 (6 blocks of 16 in its row of block_table)"
FAULTS = {
    "negative length": (set_length(-1), BAD_LENGTH, IN_TABLE.format(-1)),
    "least length": (set_length(-(1 << 31)), BAD_LENGTH, IN_TABLE.format(-(1 << 31))),
    "length beyond the table": (set_length(97), BAD_LENGTH, IN_TABLE.format(97)),
    "greatest length": (set_length((1 << 31) - 1), BAD_LENGTH, IN_TABLE.format((1 << 31) - 1)),
    "fewer tokens than queries": (
        set_length(2),
        BAD_LENGTH,
        LENGTH.format(2) + "at least its 3 new tokens, or 0",
    ),
    "negative block": (set_block(0, -1), BAD_BLOCK, BLOCK.format(0, -1) + " (blocks of the cache)"),
    "block beyond the cache": (set_block(4, 14), BAD_BLOCK, BLOCK.format(4, 14)),
    "greatest block": (set_block(2, (1 << 31) - 1), BAD_BLOCK, BLOCK.format(2, (1 << 31) - 1)),
}
each_fault = pytest.mark.parametrize(("change", "code", "words"), FAULTS.values(), ids=FAULTS)
