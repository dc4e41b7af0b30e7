"""Sequences with bad lengths or block ids: reported, harmless to the others, and never written for."""

import re

import numpy as np
import pytest
from attention_cases import (
    EVERY_CACHE,
    assert_same_bits,
    bits,
    keep_strides,
    torch,
)
from attention_faults import BAD, BAD_BLOCK, BAD_LENGTH, FAULTS, OK, batch_of, each_fault

import tokenstep as ts
from tokenstep import _native


def new_rows(batch, value=9.0):
    rows = np.full((sum(batch.counts), 2, 16), value, np.float32)
    as_rows = keep_strides(rows, "bfloat16") if isinstance(batch.arguments["q"], torch.Tensor) else rows
    return {"k": as_rows, "v": as_rows}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each_fault
def test_a_bad_sequence_gives_its_code_and_zeros_and_the_others_their_bits(
    change, code, words, dtype, threads
):
    _native.cpu.set_num_threads(threads)
    batch = batch_of(dtype)
    want = batch.attend()
    change(batch.arguments)
    status = np.full(4, 77, np.int32)
    got = batch.attend(status=status if dtype == "float32" else torch.from_numpy(status))
    assert status.tolist() == [OK, code, OK, OK]
    bad = slice(1, 4)
    assert (bits(got[0][bad]) == 0).all()
    assert (got[1][bad] == -np.inf).all()
    for rows in (slice(0, 1), slice(4, None)):
        assert_same_bits([x[rows] for x in got], [x[rows] for x in want])


@each_fault
def test_nothing_is_appended_for_a_bad_sequence(change, code, words):
    batch, good = batch_of(), batch_of(lengths=[(40, 1), (70, 0), (33, 2), (0, 1)])
    good.arguments["q"] = batch.arguments["q"][[0, 4, 5, 6]]
    change(batch.arguments)
    status = np.zeros(4, np.int32)
    batch.attend(**new_rows(batch), status=status)
    assert status[BAD] == code
    good.arguments["k_cache"], good.arguments["v_cache"] = (
        batch_of().arguments["k_cache"],
        batch_of().arguments["v_cache"],
    )
    good.attend(**new_rows(good))
    for name in ("k_cache", "v_cache"):
        np.testing.assert_array_equal(bits(batch.arguments[name]), bits(good.arguments[name]))


@each_fault
def test_without_status_it_is_an_error_and_nothing_is_written(change, code, words):
    batch = batch_of()
    change(batch.arguments)
    caches = [batch.arguments[n] for n in ("k_cache", "v_cache")]
    before = [bits(c).copy() for c in caches]
    out = np.full(batch.arguments["q"].shape, 7, np.float32)
    with pytest.raises(ValueError, match="^" + re.escape(f"tokenstep.paged_attention: {words}")):
        batch.attend(**new_rows(batch), out=out)
    assert (out == 7).all()
    for cache, kept in zip(caches, before, strict=True):
        np.testing.assert_array_equal(bits(cache), kept)


@pytest.mark.parametrize(
    "name", [n for n, (_, code, _) in FAULTS.items() if code == BAD_LENGTH or "beyond" in n]
)
def test_the_append_refuses_what_its_new_rows_need_and_writes_nothing(name):
    change, _, words = FAULTS[name]
    batch = batch_of()
    change(batch.arguments)
    a = batch.arguments
    before = [bits(a[n]).copy() for n in ("k_cache", "v_cache", "q")]
    tables = np.full((100, 8), 0.5, np.float32)
    with pytest.raises(ValueError, match="^" + re.escape(f"tokenstep.append_kv: {words}")):
        ts.append_kv(
            *new_rows(batch).values(), a["k_cache"], a["v_cache"], a["block_table"], a["seq_lens"],
            q=a["q"], query_start=a["query_start"], rope=ts.Rope(tables, tables),
        )  # fmt: skip
    for n, kept in zip(("k_cache", "v_cache", "q"), before, strict=True):
        np.testing.assert_array_equal(bits(a[n]), kept)


def test_the_first_bad_sequence_is_named():
    batch = batch_of()
    batch.arguments["seq_lens"][2] = -3
    batch.arguments["block_table"][0, 1] = -5
    with pytest.raises(ValueError, match=re.escape("block_table[0, 1] = -5")):
        batch.attend()
    status = np.zeros(4, np.int32)
    batch.attend(status=status)
    assert status.tolist() == [BAD_BLOCK, OK, BAD_LENGTH, OK]


def test_every_sequence_may_be_bad():
    batch = batch_of()
    batch.arguments["seq_lens"][:] = -1
    status = np.zeros(4, np.int32)
    out, lse = batch.attend(status=status, **new_rows(batch))
    assert (status == BAD_LENGTH).all()
    assert (bits(out) == 0).all()
    assert (lse == -np.inf).all()


def test_status_is_written_for_good_sequences_too():
    status = np.full(4, 77, np.int32)
    batch_of().attend(status=status)
    assert (status == OK).all()


# ---- blocks that are not needed are not judged -----------------------------------------------------------
@pytest.mark.parametrize("value", [-1, 99])
def test_entries_beyond_the_last_token_may_hold_anything(value):
    batch = batch_of()
    want = batch.attend()
    table = batch.arguments["block_table"]
    for r, blocks in enumerate([3, 5, 3, 0]):
        table[r, blocks:] = value
    assert_same_bits(batch.attend(), want)


def test_blocks_before_every_window_may_have_been_freed():
    """A sliding window lets an engine give blocks back: their entries are then no longer judged."""
    batch = batch_of(lengths=[(160, 1), (160, 20)])
    window = 33
    want = batch.attend(window=window)
    batch.arguments["block_table"][0, : (160 - 33) // 16] = -1
    batch.arguments["block_table"][1, : (141 - 33) // 16] = -1
    assert_same_bits(batch.attend(window=window), want)
    batch.arguments["block_table"][1, (141 - 33) // 16] = -1
    with pytest.raises(ValueError, match=re.escape("block_table[1, 6] = -1")):
        batch.attend(window=window)


def test_append_alone_needs_only_the_blocks_of_new_rows():
    batch = batch_of(lengths=[(70, 3), (33, 1)])
    a = batch.arguments
    a["block_table"][0, :4] = -1
    a["block_table"][1, :2] = -1
    rows = new_rows(batch)
    ts.append_kv(
        rows["k"],
        rows["v"],
        a["k_cache"],
        a["v_cache"],
        a["block_table"],
        a["seq_lens"],
        query_start=a["query_start"],
    )
    assert (a["k_cache"] == 9).sum() == 4 * 2 * 16


def test_positions_beyond_the_rope_tables_are_a_bad_length():
    batch = batch_of()
    tables = np.zeros((69, 8), np.float32)
    words = "seq_lens[1] = 70, expected at most 69 (the positions of rope)"
    with pytest.raises(ValueError, match="^" + re.escape(f"tokenstep.paged_attention: {words}")):
        batch.attend(rope=ts.Rope(tables, tables))
    status = np.zeros(4, np.int32)
    batch.attend(rope=ts.Rope(tables, tables), status=status)
    assert status.tolist() == [OK, BAD_LENGTH, OK, OK]


@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_length_zero_gives_zeros_whatever_the_table_says(dtype):
    batch = batch_of(dtype, [(0, 1), (0, 5)])
    batch.arguments["block_table"][:] = 99
    out, lse = batch.attend()
    assert (bits(out) == 0).all()
    assert (lse == -np.inf).all()


@each_fault
def test_the_append_with_a_status_passes_over_a_bad_sequence(change, code, words):
    """Faults that concern no block of a new row are none to it."""
    batch = batch_of()
    change(batch.arguments)
    a = batch.arguments
    status = np.full(4, 77, np.int32)
    before = bits(a["k_cache"]).copy()
    ts.append_kv(
        *new_rows(batch).values(), a["k_cache"], a["v_cache"], a["block_table"], a["seq_lens"],
        query_start=a["query_start"], status=status,
    )  # fmt: skip
    needed = code == BAD_LENGTH or "[1, 4]" in words
    assert status.tolist() == [OK, code if needed else OK, OK, OK]
    rows = 3 if needed else 6
    assert (bits(a["k_cache"]) != before).sum() == rows * 2 * 16
