"""torch.ops.tokenstep.*: what torch.library checks of an op, and the same bits inside compiled functions."""

import subprocess
import sys

import numpy as np
import pytest

import tokenstep as ts

torch = pytest.importorskip("torch")
import tokenstep.torch_ops  # noqa: E402

ops = torch.ops.tokenstep
ROWS, VOCAB = 3, 100
SEQUENCES, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 3, 4, 2, 16, 4


def compiled(function, backend="aot_eager", **options):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def assert_equal(got, want):
    got, want = ((x,) if isinstance(x, torch.Tensor) else tuple(x) for x in (got, want))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


# ---- sampling -------------------------------------------------------------------------------------------
def logits(dtype=torch.float32):
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(5)).to(dtype)


EVERYTHING = {
    "temperature": 0.7,
    "top_k": [5, 0, 50],
    "top_p": 0.9,
    "min_p": torch.tensor([0.0, 0.01, 0.02]),
    "repetition_penalty": 1.2,
    "presence_penalty": 0.1,
    "frequency_penalty": [0.2, 0.0, -0.3],
    "prompt_tokens": [[1, 2], [3], []],
    "output_tokens": [torch.tensor([5]), torch.tensor([6, 6]), torch.tensor([], dtype=torch.int64)],
    "token_bitmask": torch.full((ROWS, 4), 0x7FFFFFFF, dtype=torch.int32),
}
CASES = {
    "nothing": {},
    "greedy": {"temperature": 0.0, "logprobs": 0},
    "everything": EVERYTHING | {"logit_bias": {3: 1.5, 4: -2}, "logprobs": 3},
    "biases of rows": {"logit_bias": [{1: 9.0}, None, {2: -float("inf"), 7: 3}], "temperature": 0.5},
    "a seed a row": {"seed": [1, 2**64 - 1, -7], "position": 3, "substream": [0, 1, 2**32 - 1]},
    "a large seed": {"seed": 2**63 + 5, "position": torch.tensor([0, 1, 2])},
    "a preset": EVERYTHING | {"semantics": "transformers", "logprobs": 2},
    "a window of tokens": EVERYTHING | {"semantics": "llama.cpp", "penalty_last_n": [-1, 1, 64]},
    "processed": {"top_k": 4, "logprobs": 2, "logprobs_mode": "processed"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_sample_in_a_compiled_function_gives_the_same_bits(case, dtype):
    arguments = {"seed": 11} | CASES[case]

    def draw(rows):
        return ts.sample(rows, **arguments)

    assert_equal(compiled(draw)(logits(dtype)), draw(logits(dtype)))


@pytest.mark.parametrize("case", CASES)
def test_apply_logits_in_a_compiled_function_gives_the_same_bits(case):
    arguments = {name: value for name, value in CASES[case].items() if not name.startswith("logprobs")}

    def edit(rows):
        return ts.apply_logits(rows, **arguments)

    assert_equal(compiled(edit)(logits()), edit(logits()))


def test_apply_logits_writes_to_out_in_a_compiled_function():
    rows = logits()
    assert compiled(lambda x: ts.apply_logits(x, temperature=0.5, top_k=3, out=x))(rows) is rows
    assert torch.equal(rows, ts.apply_logits(logits(), temperature=0.5, top_k=3))


def test_without_a_seed_each_call_and_each_run_draws_anew():
    draw_twice = compiled(lambda rows: (ts.sample(rows).tokens, ts.sample(rows).tokens))
    flat = torch.zeros(4, 100_000)
    draws = [*draw_twice(flat), *draw_twice(flat)]
    assert len({tuple(tokens.tolist()) for tokens in draws}) == 4


def test_a_graph_may_leave_the_number_of_rows_open():
    draw = compiled(lambda rows: ts.sample(rows, temperature=0.7, seed=3, logprobs=1), dynamic=True)
    for count in (2, 3, 7):
        rows = torch.randn(count, VOCAB)
        assert_equal(draw(rows), ts.sample(rows, temperature=0.7, seed=3, logprobs=1))


def test_a_wrong_value_is_the_same_error_in_a_compiled_function():
    with pytest.raises(ValueError, match="temperature"):
        compiled(lambda rows: ts.sample(rows, temperature=-1.0))(logits())


@pytest.mark.parametrize("name", ["sample", "apply_logits"])
def test_the_sampling_ops_pass_the_checks_of_torch(name):
    parameters = {
        "temperature": torch.tensor([0.5, 0.0, 1.5]),
        "top_k": torch.tensor([3, 4, 5], dtype=torch.int32),
        "output_tokens": [torch.tensor([i]) for i in range(ROWS)],
        "bias_ids": [4],
        "bias_values": [0.5],
    }
    if name == "sample":
        parameters |= {"seed": torch.tensor([1, 2, 3]), "logprobs": 2}
    torch.library.opcheck(getattr(ops, name).default, (logits(),), parameters)


# ---- attention ------------------------------------------------------------------------------------------
def random_batch(seed=0):
    """q, k, v, caches, table and lengths of one decode step."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    lengths = torch.tensor([9, 1, 14], dtype=torch.int32)
    table = torch.randperm(SEQUENCES * 4, generator=generator).to(torch.int32).view(SEQUENCES, 4)
    caches = normal(2, SEQUENCES * 4, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    q = normal(SEQUENCES, HEADS, HEAD_DIM)
    k, v = normal(2, SEQUENCES, KV_HEADS, HEAD_DIM)
    return q, k, v, caches[0].clone(), caches[1].clone(), table, lengths


def rope(interleaved=False):
    angles = torch.outer(torch.arange(64.0), torch.arange(1.0, 5.0))
    return ts.Rope(angles.cos(), angles.sin(), interleaved)


SCORES = {
    "plain": {},
    "window": {"window": 5, "scale": 0.3},
    "softcap, alibi, sinks": {
        "softcap": 5.0,
        "alibi_slopes": torch.linspace(0.1, 0.4, HEADS),
        "sinks": torch.linspace(-1, 1, HEADS),
    },
}


@pytest.mark.parametrize("options", SCORES)
def test_paged_attention_in_a_compiled_function_gives_the_same_bits(options):
    q, _, _, k_cache, v_cache, table, lengths = random_batch()

    def attend(q):
        return ts.paged_attention(q, k_cache, v_cache, table, lengths, return_lse=True, **SCORES[options])

    assert_equal(compiled(attend)(q), attend(q))


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_append_in_a_compiled_function_writes_the_same_bits_to_the_caches(interleaved):
    def step(q, k, v, k_cache, v_cache, table, lengths):
        out = ts.paged_attention(q, k_cache, v_cache, table, lengths, k=k, v=v, rope=rope(interleaved))
        return out + 1, k_cache[0] * 2  # what follows sees the append

    got, want = random_batch(), random_batch()
    assert_equal(compiled(step)(*got), step(*want))
    assert_equal(got, want)


def test_append_kv_in_a_compiled_function_rotates_q_in_place():
    def append(q, k, v, k_cache, v_cache, table, lengths):
        ts.append_kv(k, v, k_cache, v_cache, table, lengths, q=q, rope=rope())
        return q * 2

    got, want = random_batch(), random_batch()
    assert_equal(compiled(append)(*got), append(*want))
    assert_equal(got, want)


def test_out_and_status_are_filled_in_a_compiled_function():
    q, _, _, k_cache, v_cache, table, lengths = random_batch()
    table[1, 0] = 99
    out, status = torch.empty_like(q), torch.full((SEQUENCES,), -1, dtype=torch.int32)

    @compiled
    def attend(q, out, status):
        return ts.paged_attention(q, k_cache, v_cache, table, lengths, out=out, status=status)

    assert attend(q, out, status) is out
    assert status.tolist() == [0, 1, 0]
    assert torch.equal(out, ts.paged_attention(q, k_cache, v_cache, table, lengths, status=status.clone()))


def test_merge_attention_in_a_compiled_function_gives_the_same_bits():
    outs, lses = torch.randn(2, 3, HEADS, HEAD_DIM), torch.randn(2, 3, HEADS)
    assert_equal(compiled(lambda o, x: ts.merge_attention(o, x))(outs, lses), ts.merge_attention(outs, lses))


def test_the_attention_ops_pass_the_checks_of_torch():
    q, k, v, k_cache, v_cache, table, lengths = random_batch()
    tables = {"rope_cos": rope().cos, "rope_sin": rope().sin}
    status = torch.zeros(SEQUENCES, dtype=torch.int32)
    torch.library.opcheck(
        ops.paged_attention.default, (q, k_cache, v_cache, table, lengths), {"status": status} | tables
    )
    torch.library.opcheck(
        ops.append_and_attend.default, (q, k, v, k_cache, v_cache, table, lengths), {"window": 4} | tables
    )
    torch.library.opcheck(ops.append_kv.default, (k, v, k_cache, v_cache, table, lengths), {"q": q} | tables)
    torch.library.opcheck(
        ops.merge_attention.default, (torch.randn(2, 3, HEADS, HEAD_DIM), torch.randn(2, 3, HEADS))
    )


# ---- both -----------------------------------------------------------------------------------------------
def decode_step(q, k, v, k_cache, v_cache, table, lengths, head, functions=ts):
    out = functions.paged_attention(q, k_cache, v_cache, table, lengths, k=k, v=v, rope=rope())
    logits = out.flatten(1) @ head
    return functions.sample(logits, temperature=0.8, top_p=0.9, seed=5, position=lengths.long())


def test_a_decode_step_compiles_with_inductor_as_one_graph():
    head = torch.randn(HEADS * HEAD_DIM, VOCAB)
    step = compiled(decode_step, backend="inductor")
    assert_equal(step(*random_batch(1), head)[:2], decode_step(*random_batch(1), head)[:2])


def test_a_decode_step_can_be_exported():
    class Step(torch.nn.Module):
        def forward(self, *arguments):
            return tuple(decode_step(*arguments, functions=tokenstep.torch_ops)[:2])

    arguments = (*random_batch(2), torch.randn(HEADS * HEAD_DIM, VOCAB))
    program = torch.export.export(Step(), arguments)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"tokenstep.append_and_attend.default", "tokenstep.sample.default"} <= names
    again = (*random_batch(2), arguments[-1])
    assert_equal(program.module()(*again), decode_step(*random_batch(2), arguments[-1])[:2])


def test_functions_outside_of_a_graph_stay_as_they_are():
    script = """
import torch, tokenstep as ts
before = ts.sample, ts.apply_logits, ts.paged_attention, ts.append_kv, ts.merge_attention
import tokenstep.torch_ops
assert before == (ts.sample, ts.apply_logits, ts.paged_attention, ts.append_kv, ts.merge_attention)
print(ts.sample(torch.zeros(1, 4), temperature=0.0).tokens.item())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout == "0\n", result.stderr


def test_numpy_arrays_are_sampled_as_before():
    assert ts.sample(np.zeros((1, 4), np.float32), temperature=0.0).tokens.tolist() == [0]
