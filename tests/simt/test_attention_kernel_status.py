"""Bad lengths, block ids and rows on the device: status, zeros, no illegal access, and no harm to others."""

import re

import numpy as np
import pytest
from attention_cases import assert_same_bits, bits, torch
from attention_device import on_device
from attention_faults import BAD, BAD_BLOCK, BAD_LENGTH, OK, batch_of, each_fault

LENGTHS = [(40, 1), (70, 3), (33, 2), (0, 1)]
MANY_TILES = [(40, 1), (70, 65), (33, 2), (0, 1)]  # 65 queries x 2 heads are 9 tiles of rows


def new_rows(batch):
    rows = torch.full((sum(batch.counts), 2, 16), 9.0, dtype=torch.bfloat16)
    return {"k": rows, "v": rows.clone()}


def status_of(batch):
    return torch.full((len(batch.counts),), 77, dtype=torch.int32)


@pytest.mark.parametrize("lengths", [LENGTHS, MANY_TILES], ids=["few rows", "many rows"])
@each_fault
def test_a_bad_sequence_gives_its_code_and_zeros_and_others_their_bits(device, change, code, words, lengths):
    batch = on_device(device, batch_of("bfloat16", lengths), together=3)
    want = batch.attend()
    change(batch.arguments)
    status = status_of(batch)
    got = batch.attend(status=status)
    assert status.tolist() == [OK, code, OK, OK]
    assert_same_bits(batch.attend(), got, "without a status array")
    end = 1 + batch.counts[BAD]
    assert (bits(got[0][1:end]) == 0).all()
    assert (got[1][1:end] == -np.inf).all()
    for rows in (slice(0, 1), slice(end, None)):
        assert_same_bits([x[rows] for x in got], [x[rows] for x in want])


@pytest.mark.parametrize("lengths", [LENGTHS, MANY_TILES], ids=["few rows", "many rows"])
@each_fault
def test_nothing_is_appended_for_a_bad_sequence(device, change, code, words, lengths):
    batch = on_device(device, batch_of("bfloat16", lengths), together=3)
    before = [bits(batch.arguments[n]).copy() for n in ("k_cache", "v_cache")]
    change(batch.arguments)
    status = status_of(batch)
    batch.attend(**new_rows(batch), status=status)
    assert status[BAD] == code
    nine = bits(torch.tensor([9.0], dtype=torch.bfloat16))[0]
    for cache, old in zip((batch.arguments["k_cache"], batch.arguments["v_cache"]), before, strict=True):
        changed = (bits(cache) != old).any(-1)
        assert changed.sum() == (1 + 2) * 2  # the new tokens of sequences 0 and 2, in two heads
        assert (bits(cache)[changed] == nine).all()


def test_a_bad_block_far_from_the_first_is_everybodys_verdict(device):
    """Partial results come from several blocks, of which one meets the bad id."""
    batch = on_device(device, batch_of("bfloat16", [(1300, 1), (1300, 1), (1300, 1)]), together=4, grid=5)
    for column in (0, 40, 81):
        good = batch.arguments["block_table"][1, column]
        batch.arguments["block_table"][1, column] = 1 << 20
        status = status_of(batch)
        out, _ = batch.attend(status=status)
        assert status.tolist() == [OK, BAD_BLOCK, OK]
        assert (bits(out[1]) == 0).all()
        batch.arguments["block_table"][1, column] = good


def test_status_is_written_for_sequences_without_queries(device):
    batch = on_device(device, batch_of("bfloat16", [(40, 1), (90, 0), (0, 0)]))
    status = status_of(batch)
    batch.attend(status=status)
    assert status.tolist() == [OK, OK, OK]
    batch.arguments["seq_lens"][1] = -1
    batch.attend(status=status)
    assert status.tolist() == [OK, BAD_LENGTH, OK]


def test_blocks_before_every_window_may_have_been_freed(device):
    batch = on_device(device, batch_of("bfloat16", [(160, 1), (160, 20)]))
    want = batch.attend(window=33)
    batch.arguments["block_table"][0, : (160 - 33) // 16] = -1
    batch.arguments["block_table"][1, : (141 - 33) // 16] = -1
    status = status_of(batch)
    assert_same_bits(batch.attend(window=33, status=status), want)
    assert status.tolist() == [OK, OK]
    batch.arguments["block_table"][1, (141 - 33) // 16] = -1
    batch.attend(window=33, status=status)
    assert status.tolist() == [OK, BAD_BLOCK]


def test_positions_beyond_the_rope_tables_are_a_bad_length(device):
    import tokenstep as ts

    batch = on_device(device, batch_of("bfloat16"))
    tables = torch.zeros(69, 8)
    status = status_of(batch)
    batch.attend(rope=ts.Rope(tables, tables.clone()), status=status)
    assert status.tolist() == [OK, BAD_LENGTH, OK, OK]


def test_rows_of_no_sequence_are_zeros(device):
    batch = on_device(device, batch_of("bfloat16"))
    want = batch.attend()
    q, start = batch.arguments["q"], batch.arguments["query_start"]
    batch.arguments["q"] = torch.cat([q[:2], q, q[:3]])
    batch.arguments["query_start"] = start + 2
    got = batch.attend()
    assert_same_bits([x[2 : 2 + len(q)] for x in got], want)
    for rows in (slice(0, 2), slice(2 + len(q), None)):
        assert (bits(got[0][rows]) == 0).all()
        assert (got[1][rows] == -np.inf).all()


@pytest.mark.parametrize(
    ("start", "codes"),
    [
        ([0, 1, 4, 2, 7], [OK, OK, BAD_LENGTH, BAD_LENGTH]),
        ([-5, 1, 4, 6, 7], [BAD_LENGTH, OK, OK, OK]),
        ([0, 1, 4, 6, 1 << 30], [OK, OK, OK, BAD_LENGTH]),
        ([-(1 << 31), (1 << 31) - 1, -(1 << 31), 6, 7], [BAD_LENGTH, BAD_LENGTH, BAD_LENGTH, OK]),
    ],
)
def test_rows_that_are_not_rows_of_q_are_a_bad_length(device, start, codes):
    batch = on_device(device, batch_of("bfloat16"))
    batch.arguments["query_start"] = torch.tensor(start, dtype=torch.int64).to(torch.int32)
    status = status_of(batch)
    batch.attend(status=status)
    assert status.tolist() == codes


def test_rows_of_a_cache_that_cannot_be_copied_in_pieces_are_refused(device):
    batch = on_device(device, batch_of("bfloat16"))
    odd = torch.zeros(14 * 16 * 2 * 16 + 1, dtype=torch.bfloat16)[1:].view(14, 16, 2, 16)
    batch.arguments["k_cache"] = odd
    words = "tokenstep.paged_attention: k_cache has rows at strides of 512, 32 and 16 elements, expected rows"
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        batch.attend()
