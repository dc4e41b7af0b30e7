"""The GPU's benchmark of attention as far as it runs without one: its cases, bytes, peers and command."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tokenstep import _native  # noqa: E402
from tokenstep.bench import attention_gpu, attention_inputs  # noqa: E402
from tokenstep.bench.attention_inputs import CACHE_DTYPES, HEADS, LENGTHS, Heads, lengths_of, make_inputs  # noqa: E402
from tokenstep.cli.main import main  # noqa: E402

SMALL = Heads("small", 6, 2, 16)


@pytest.fixture(autouse=True)
def few_caches(monkeypatch):
    monkeypatch.setattr(attention_inputs, "COLD_BYTES", 1 << 16)


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize(("batch", "context"), [(1, 256), (2, 256), (8, 1024), (64, 4096), (5, 7)])
def test_skewed_lengths_have_as_many_tokens_as_equal_ones(kind, batch, context):
    lengths = lengths_of(kind, batch, context)
    assert sum(lengths) == batch * context
    assert min(lengths) >= 1
    assert len(lengths) == batch
    if kind == "skewed" and batch > 1:
        assert max(lengths) >= sum(lengths) // 2
        assert batch == 2 or max(lengths) > min(lengths)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_the_bytes_are_those_of_keys_values_queries_and_results(cache_dtype):
    inputs = make_inputs(SMALL, [20, 5], 16, "bfloat16", cache_dtype, "cpu")
    size = 2 if cache_dtype == "same" else 1
    assert inputs.cache_bytes == (20 + 5) * 2 * (2 * 16) * size
    assert inputs.moved_bytes - inputs.cache_bytes == 2 * (2 * 6 * 16) * 2
    held = sum(k.nbytes + v.nbytes for k, v in inputs.caches)
    assert held >= attention_inputs.COLD_BYTES, "calls in turn exceed the caches of the machine"


def attended(inputs):
    """What tokenstep gives for the first cache of the inputs, and what torch does, each float64."""
    import tokenstep as ts

    k_cache, v_cache = inputs.caches[0]
    got = ts.paged_attention(inputs.q, k_cache, v_cache, inputs.block_table, inputs.seq_lens, **inputs.scales)
    scales = [inputs.scales.get(n, torch.ones(SMALL.num_kv_heads))[:, None] for n in ("k_scale", "v_scale")]
    wanted = []
    for row, length, query in zip(inputs.block_table, inputs.lengths, inputs.q, strict=True):
        ids = row[: -(-length // inputs.block_size)]
        k, v = (
            (cache[ids].float().flatten(0, 1)[:length] * scale).transpose(0, 1)
            for cache, scale in zip((k_cache, v_cache), scales, strict=True)
        )
        wanted.append(
            torch.nn.functional.scaled_dot_product_attention(query.float()[:, None], k, v, enable_gqa=True)[
                :, 0
            ]
        )
    return got.double(), torch.stack(wanted).double()


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_inputs_are_sequences_in_pages(cache_dtype):
    got, want = attended(make_inputs(SMALL, [50, 3, 17], 16, "float32", cache_dtype, "cpu"))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_what_refuses_the_inputs_is_left_out_with_its_words():
    def refuses():
        raise NotImplementedError("no such head_dim\nand much more")

    calls = []
    kept, refused = attention_gpu.usable({"works": lambda: calls.append(1), "peer": refuses})
    assert list(kept) == ["works"]
    assert refused == {"peer": "NotImplementedError: no such head_dim"}
    assert calls == [1]


def test_peers_that_are_not_installed_are_left_out(monkeypatch):
    for name in ("flashinfer", "fusedtok"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    inputs = make_inputs(SMALL, [20, 20], 16, "bfloat16", "same", "cpu")
    found = attention_gpu.implementations(inputs, ["torch", "flashinfer", "fusedtok"])
    assert list(found) == ["tokenstep", "torch"]
    skewed = make_inputs(SMALL, [20, 5], 16, "bfloat16", "same", "cpu")
    assert list(attention_gpu.implementations(skewed, ["torch"])) == ["tokenstep"]


class RecordingWrapper:
    """Stands for FlashInfer's wrapper: keeps what it is planned and run with."""

    def __init__(self, memory, layout, *, use_tensor_cores):
        self.layout, self.use_tensor_cores = layout, use_tensor_cores

    def plan(self, *arguments, **types):
        self.planned, self.types = arguments, types
        RecordingWrapper.last = self

    def run(self, q, caches):
        return q, caches


def test_flashinfer_is_planned_with_the_pages_of_each_sequence(monkeypatch):
    stub = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=RecordingWrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", stub)
    inputs = make_inputs(SMALL, [33, 16, 1], 16, "bfloat16", "same", "cpu")
    call = attention_gpu.flashinfer_decode(inputs)
    starts, ids, last, *sizes = RecordingWrapper.last.planned
    assert starts.tolist() == [0, 3, 4, 5]
    assert last.tolist() == [1, 16, 1]
    table = inputs.block_table
    assert ids.tolist() == [*table[0, :3].tolist(), table[1, 0].item(), table[2, 0].item()]
    assert sizes == [6, 2, 16, 16]
    assert RecordingWrapper.last.use_tensor_cores
    assert call()[1] is not call()[1], "each call takes other caches"


def test_fusedtok_gets_pages_in_its_own_layout(monkeypatch):
    def decode(q, k_pool, v_pool, table, lens):
        return k_pool, table

    monkeypatch.setitem(sys.modules, "fusedtok", SimpleNamespace(attention_decode_paged=decode))
    inputs = make_inputs(SMALL, [33, 5], 16, "bfloat16", "same", "cpu")
    pool, table = attention_gpu.fusedtok_decode(inputs)()
    torch.testing.assert_close(pool, inputs.caches[0][0].transpose(1, 2))
    assert pool.is_contiguous()
    assert (table >= 0).all()


# ---- the command -----------------------------------------------------------------------------------------
@pytest.mark.skipif(_native.cuda_unusable_because() is None, reason="there is a GPU")
@pytest.mark.parametrize("op", ["sample", "attention"])
def test_without_a_gpu_the_command_says_why(op, capsys):
    assert main(["bench", op, "--device", "cuda"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("peers found here: ")
    assert said[1].startswith("tokenstep bench: ")


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        ("--models", "nobody", list(HEADS)),
        ("--lengths", "equal,odd", LENGTHS),
        ("--cache-dtypes", "int4", CACHE_DTYPES),
        ("--models", ",", list(HEADS)),
    ],
)
def test_what_is_no_choice_is_refused_with_the_choices(option, value, known, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "attention", option, value])
    assert f"'{value}', expected of {', '.join(known)}" in capsys.readouterr().err
