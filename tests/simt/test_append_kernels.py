"""append_kv on the device: the CPU's bits in every dtype and layout, and its verdicts on bad sequences."""

import numpy as np
import pytest
from attention_append_cases import Case, angles_of
from attention_cases import EVERY_CACHE, Heads, bits, row_dtype, torch
from attention_faults import BAD, BAD_BLOCK, BAD_LENGTH, OK, set_block, set_length
from device_arrays import append_on

import tokenstep as ts

LENGTHS = [(30, 1), (33, 20), (0, 1), (1, 1), (9, 9), (12, 0), (17, 2)]
ROTATIONS = {
    "none": {},
    "neox": {"rotary_dim": 80},
    "interleaved": {"rotary_dim": 80, "interleaved": True},
    "partial neox": {"rotary_dim": 32},
    "partial neox of odd halves": {"rotary_dim": 30},
    "partial interleaved": {"rotary_dim": 6, "interleaved": True},
}


def appended(dtype, call=ts.append_kv, rotation="none", rotates_q=True, change=None, status=None, **how):
    """Bits of the caches and of q afterwards, and the statuses."""
    case = Case(dtype, **{"lengths": LENGTHS} | how)
    head_dim = case.k.shape[-1]
    arguments = case.batch.arguments
    options = {"q": arguments["q"]} if rotates_q else {}
    if rope := dict(ROTATIONS[rotation]):
        angles = angles_of(head_dim, min(rope.pop("rotary_dim"), head_dim))
        options["rope"] = case.rope(angles, **rope)
    if change:
        change(arguments)
    if status is not None:
        options["status"] = torch.from_numpy(status) if isinstance(arguments["q"], torch.Tensor) else status
    case.append(call, **options)
    return [*case.caches(), bits(arguments["q"]), status]


def assert_equal(got, want):
    for name, a, b in zip(("k_cache", "v_cache", "q", "status"), got, want, strict=True):
        np.testing.assert_array_equal(a, b, name)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("dtype", EVERY_CACHE)
def test_rows_are_rotated_rounded_and_written_as_on_the_cpu(device, dtype, rotation):
    statuses = [np.full(len(LENGTHS), 77, np.int32) for _ in range(2)]
    want = appended(dtype, rotation=rotation, status=statuses[0])
    assert_equal(appended(dtype, append_on(device), rotation, status=statuses[1]), want)
    assert (statuses[1] == OK).all()


@pytest.mark.parametrize("layout", ["HND", "joint", "padded"])
@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16/int8", "float32/float8_e4m3"])
def test_pages_of_any_size_and_strides(device, dtype, block_size, layout):
    how = {"layout": layout, "block_size": block_size, "rotation": "neox"}
    assert_equal(appended(dtype, append_on(device), **how), appended(dtype, **how))


@pytest.mark.parametrize(
    "heads",
    [
        Heads(1, 1, 8),
        Heads(3, 1, 16),
        Heads(14, 2, 64),
        Heads(4, 4, 96),
        Heads(16, 2, 128),
        Heads(2, 1, 200),
        Heads(8, 8, 256),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16/int8"])
def test_every_head_size_and_grouping(device, dtype, heads):
    how = {"heads": heads, "rotation": "neox", "lengths": [(20, 3), (5, 1)]}
    assert_equal(appended(dtype, append_on(device), **how), appended(dtype, **how))


def test_decoding_rows_need_no_query_start(device):
    how = {"lengths": [(5, 1), (0, 1), (16, 1), (17, 1)], "rotation": "neox"}
    statuses = [np.full(4, 77, np.int32) for _ in range(2)]
    got = appended("bfloat16", append_on(device), status=statuses[0], **how)
    assert_equal(got, appended("bfloat16", status=statuses[1], **how))


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat16/int8"])
def test_rows_that_are_not_aligned_are_read_one_by_one(device, dtype, first):
    """New rows and q as a slice of something wider: at odd strides, and from an odd element on."""

    def odd(call):
        case = Case(dtype, lengths=[(20, 3), (5, 1)])
        kind = getattr(torch, row_dtype(dtype))
        q = case.batch.arguments["q"]
        wide = torch.zeros(*q.shape[:2], 83, dtype=kind)
        part = (..., slice(first, first + 80))
        wide[part] = torch.as_tensor(q)
        pad = (first, 3 - first)
        case.array = lambda x: torch.nn.functional.pad(torch.from_numpy(x), pad).to(kind)[part]
        case.append(call, q=wide[part], rope=case.rope(angles_of(80, 80)))
        return [*case.caches(), bits(wide), None]

    assert_equal(odd(append_on(device)), odd(ts.append_kv))


# ---- bad sequences ---------------------------------------------------------------------------------------
# Sequence 1 is made bad: 33 tokens, 20 of them new, in blocks of 16.
FAULTS = {
    "negative length": (set_length(-1), BAD_LENGTH),
    "least length": (set_length(-(1 << 31)), BAD_LENGTH),
    "length beyond the table": (set_length(4 * 16 + 1), BAD_LENGTH),
    "greatest length": (set_length((1 << 31) - 1), BAD_LENGTH),
    "fewer tokens than new rows": (set_length(19), BAD_LENGTH),
    "negative block": (set_block(0, -1), BAD_BLOCK),
    "block beyond the cache": (set_block(2, 1 << 20), BAD_BLOCK),
    "greatest block": (set_block(1, (1 << 31) - 1), BAD_BLOCK),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16/int8"])
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_appended_or_rotated_for_a_bad_sequence_and_the_others_are_unaffected(
    device, dtype, fault
):
    change, code = FAULTS[fault]
    want_status = [code if r == BAD else OK for r in range(len(LENGTHS))]
    found = []
    for call in (append_on(device), ts.append_kv):
        status = np.full(len(LENGTHS), 77, np.int32)
        found.append(appended(dtype, call, "neox", change=change, status=status))
        assert status.tolist() == want_status
    assert_equal(*found)


def test_a_block_that_no_new_row_needs_is_not_judged(device):
    def change(arguments):
        arguments["block_table"][0, 0] = -1  # its one new token lies in its second block
        arguments["block_table"][BAD, 3:] = 99

    statuses = [np.full(len(LENGTHS), 77, np.int32) for _ in range(2)]
    got = appended("float16", append_on(device), change=change, status=statuses[0])
    assert_equal(got, appended("float16", change=change, status=statuses[1]))
    assert (statuses[0] == OK).all()


def test_positions_beyond_the_rope_tables_are_a_bad_length(device):
    found = []
    for call in (append_on(device), ts.append_kv):
        case = Case("float32", lengths=LENGTHS)
        status = np.full(len(LENGTHS), 77, np.int32)
        case.append(call, rope=case.rope(angles_of(80, 80, 32)), status=status)
        found.append([*case.caches(), None, status])
    assert_equal(*found)
    assert found[0][3].tolist() == [OK, BAD_LENGTH, OK, OK, OK, OK, OK]


@pytest.mark.parametrize(
    "start",
    [[-5, 1, 21, 22, 23, 32, 32, 34], [0, 30, 21, 22, 23, 32, 32, 34], [0, 1, 21, 22, 23, 32, 32, 99]],
    ids=str,
)
def test_a_query_start_that_is_no_partition_gives_a_status_and_harms_nothing(device, start):
    """The host cannot see it on a device: no access is out of bounds, and no other sequence suffers."""
    case = Case("float32", lengths=LENGTHS)
    case.batch.arguments["query_start"][:] = start
    status = np.full(len(LENGTHS), 77, np.int32)
    case.append(append_on(device), status=status)
    assert BAD_LENGTH in status.tolist()
    assert set(status.tolist()) <= {OK, BAD_LENGTH}


def test_without_a_status_a_bad_sequence_is_passed_over(device):
    change, _ = FAULTS["negative block"]
    got = appended("float32", append_on(device), change=change)[:3]
    want = appended("float32", change=change, status=np.zeros(len(LENGTHS), np.int32))[:3]
    assert_equal([*got, None], [*want, None])


def test_no_rows_and_no_sequences(device):
    q = np.zeros((0, 2, 16), np.float32)
    cache = np.zeros((1, 4, 2, 16), np.float32)
    append_on(device)(q, q, cache, cache.copy(), np.zeros((0, 1), np.int32), np.zeros(0, np.int32))


@pytest.mark.cuda
def test_a_captured_append_follows_the_lengths_of_its_replay(device):
    if device.name != "cuda":
        pytest.skip("graphs are the GPU's")
    k = torch.ones(1, 2, 16, device="cuda")
    caches = [torch.zeros(4, 4, 2, 16, device="cuda") for _ in "kv"]
    table = torch.arange(4, dtype=torch.int32, device="cuda")[None]
    lengths = torch.ones(1, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ts.append_kv(k, k, *caches, table, lengths)
    for length in (1, 6, 16):
        lengths.fill_(length)
        graph.replay()
    written = caches[0].flatten(0, 1).any(-1).all(-1).nonzero().flatten().tolist()
    assert written == [0, 5, 15]
