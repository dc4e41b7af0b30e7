"""The contract's steps one by one, its edge cases, and rows that cannot be sampled."""

import math

import numpy as np
import pytest
from sample_cases import assert_same

from tokenstep import sampling as ts

INF, NAN = math.inf, math.nan


def rows(*values):
    return np.array(values, np.float32)


def tokens_seen(logits, n=4000, **arguments):
    """The set of tokens that n draws from one row give."""
    many = np.broadcast_to(np.asarray(logits, np.float32), (n, len(logits)))
    return set(ts.sample(many, seed=1, position=np.arange(n), **arguments).tokens.tolist())


def greedy(logits, **arguments):
    return ts.sample(rows(logits), temperature=0, **arguments).tokens.tolist()[0]


# ---- outputs
# ------------------------------------------------------------------------------------------------
def test_outputs_have_the_documented_dtypes_and_shapes():
    x = np.zeros((3, 40), np.float32)
    out = ts.sample(x, seed=1)
    assert isinstance(out, ts.SampleOutput)
    assert (out.tokens.dtype, out.tokens.shape) == (np.int64, (3,))
    assert (out.status.dtype, out.status.shape) == (np.int32, (3,))
    assert out[2:] == (None,) * 4
    for n in (0, 1, 20):
        out = ts.sample(x, seed=1, logprobs=n)
        assert (out.logprobs.dtype, out.logprobs.shape) == (np.float32, (3,))
        assert (out.ranks.dtype, out.ranks.shape) == (np.int32, (3,))
        assert (out.top_tokens.dtype, out.top_tokens.shape) == (np.int64, (3, n))
        assert (out.top_logprobs.dtype, out.top_logprobs.shape) == (np.float32, (3, n))


def test_no_rows_give_empty_outputs():
    out = ts.sample(np.zeros((0, 10), np.float32), logprobs=3)
    assert [a.shape for a in out] == [(0,), (0,), (0,), (0,), (0, 3), (0, 3)]
    assert ts.apply_logits(np.zeros((0, 10), np.float32)).shape == (0, 10)


def test_a_vocabulary_of_one_token_gives_that_token():
    out = ts.sample(rows([3.0], [-1e30]), seed=2, top_p=0.5, top_k=1, min_p=1, logprobs=2)
    assert out.tokens.tolist() == [0, 0]
    assert out.logprobs.tolist() == [0, 0]
    assert out.ranks.tolist() == [1, 1]
    assert out.top_tokens.tolist() == [[0, -1]] * 2
    assert out.top_logprobs[0, 0] == 0
    assert np.isnan(out.top_logprobs[:, 1]).all()


def test_inputs_are_not_written_to():
    x = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    before, mask = x.copy(), np.full((4, 2), 0x0F0F0F0F, np.int32)
    lists, bias = [[1, 2]] * 4, {3: 1.0}
    ts.sample(
        x, repetition_penalty=2, output_tokens=lists, logit_bias=bias, token_bitmask=mask, seed=1, logprobs=2
    )
    ts.apply_logits(
        x, repetition_penalty=2, output_tokens=lists, logit_bias=bias, token_bitmask=mask, top_k=2
    )
    assert np.array_equal(x, before)
    assert (mask == 0x0F0F0F0F).all()
    assert (lists, bias) == ([[1, 2]] * 4, {3: 1.0})


# ---- steps ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [0, 1e-6, 9.99e-6])
def test_below_1e_5_the_lowest_id_among_the_largest_is_taken(temperature):
    x = rows([1, 5, 5, 2], [0.0, -0.0, -1, -1], [-0.0, 0.0, -1, -1], [-INF, -3, -3, -INF])
    out = ts.sample(x, temperature=temperature, top_k=1, top_p=0.1, min_p=0.5)
    assert out.tokens.tolist() == [1, 0, 0, 1]


def test_a_temperature_of_1e_5_still_draws():
    assert tokens_seen([1.0, 1.0, 0.5], temperature=1e-5) == {0, 1}


def test_a_temperature_so_low_that_the_largest_value_overflows_is_greedy():
    x = rows([3e38, 3.1e38, 1.0, 3.1e38])
    out = ts.sample(x, temperature=0.5, seed=1, logprobs=1, logprobs_mode="processed")
    assert out.tokens.tolist() == [1]
    assert out.top_tokens.tolist() == [[1]]
    assert np.isfinite(out.logprobs).all()


def test_the_bitmask_bans_by_bit_and_word():
    x = np.zeros((1, 70), np.float32)
    mask = np.array([[1 << 5, 1 << 0, 1 << 5]], np.int32)  # 5, 32, 69
    many = np.broadcast_to(x, (2000, 70)), np.broadcast_to(mask, (2000, 3))
    out = ts.sample(many[0], token_bitmask=many[1], seed=1, position=np.arange(2000))
    assert set(out.tokens.tolist()) == {5, 32, 69}


def test_bits_beyond_the_vocabulary_are_ignored():
    out = ts.sample(rows([0, 1, 2]), token_bitmask=np.array([[-8]], np.int32), check=False)
    assert (out.tokens.tolist(), out.status.tolist()) == ([-1], [2])


def test_a_bias_adds_bans_and_is_not_clipped():
    assert greedy([0, 1, 2], logit_bias={0: 2.5}) == 0
    assert greedy([0, 1, 2], logit_bias={2: -INF}) == 1
    assert greedy([0, 1, 200], logit_bias={2: -100}) == 2
    assert greedy([0, 1, 200], logit_bias={2: -250}) == 1
    assert greedy([0, 1, -INF], logit_bias={2: 1e30}) == 1
    out = ts.sample(rows([0, 1, 2], [0, 1, 2]), temperature=0, logit_bias=[{0: 9.0}, None])
    assert out.tokens.tolist() == [0, 2]


def test_a_bias_does_not_lift_what_the_bitmask_bans():
    assert greedy([0, 1, 2], logit_bias={2: 50}, token_bitmask=np.array([[3]], np.int32)) == 1


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_output():
    x = rows([2.0, -2.0, 4.0, 0.0, 1.0])
    out = ts.apply_logits(x, repetition_penalty=2.0, prompt_tokens=[[0, 0, 1]], output_tokens=[[2, 2, 3]])
    assert out.tolist() == [[1.0, -4.0, 2.0, 0.0, 1.0]]


def test_frequency_counts_the_output_and_presence_asks_whether_there_is_any():
    x = np.zeros((1, 5), np.float32)
    out = ts.apply_logits(
        x, frequency_penalty=0.5, presence_penalty=0.25, prompt_tokens=[[0, 1]], output_tokens=[[1, 2, 2, 2]]
    )
    assert out.tolist() == [[0.0, -0.75, -1.75, 0.0, 0.0]]


def test_the_penalties_come_in_the_order_repetition_frequency_presence_after_the_bias():
    out = ts.apply_logits(
        rows([1.0, 0.0]),
        logit_bias={0: 3.0},
        repetition_penalty=2.0,
        frequency_penalty=1.0,
        presence_penalty=0.5,
        output_tokens=[[0, 0]],
        temperature=0.5,
    )
    assert out.tolist() == [[((1 + 3) / 2 - 2 - 0.5) * 2, 0.0]]


def test_top_k_keeps_exactly_k_and_the_lowest_ids_among_equals():
    assert tokens_seen([1, 2, 2, 2, 0], top_k=2) == {1, 2}
    assert tokens_seen([1, 2, 2, 2, 0], top_k=4) == {0, 1, 2, 3}
    assert tokens_seen([0.0, -0.0, 0.0, -0.0], top_k=3) == {0, 1, 2}


@pytest.mark.parametrize("top_k", [0, -1, 5, 6, 1 << 40, -(1 << 70), 1 << 70])
def test_top_k_of_nothing_or_of_everything_is_off(top_k):
    assert tokens_seen([1, 1.1, 1.2, 1.1, 0.9], top_k=top_k) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_shortest_prefix_that_reaches_its_share():
    x = np.log([0.5, 0.3, 0.15, 0.05])
    assert tokens_seen(x, top_p=0.49) == {0}
    assert tokens_seen(x, top_p=0.51) == {0, 1}
    assert tokens_seen(x, top_p=0.81) == {0, 1, 2}
    assert tokens_seen(x, top_p=0.96) == {0, 1, 2, 3}
    assert tokens_seen([0, 0, 0, 0], top_p=0.5) == {0, 1}
    assert tokens_seen([0, 0, 0, 0], top_p=np.nextafter(np.float32(0.5), np.float32(1))) == {0, 1, 2}


def test_top_p_of_zero_keeps_the_first_token_alone():
    assert tokens_seen([0, 0, 0], top_p=0.0) == {0}
    assert tokens_seen([0, 0, 0], top_p=1e-45) == {0}


def test_top_p_is_a_share_of_what_top_k_left():
    assert tokens_seen(np.log([0.4, 0.3, 0.2, 0.1]), top_k=2, top_p=0.56) == {0}  # 4/7
    assert tokens_seen(np.log([0.4, 0.3, 0.2, 0.1]), top_k=2, top_p=0.58) == {0, 1}


def test_min_p_keeps_what_is_likely_enough_beside_the_most_likely():
    x = np.log([0.5, 0.26, 0.24])
    assert tokens_seen(x, min_p=0.5) == {0, 1}
    assert tokens_seen(x, min_p=0.47) == {0, 1, 2}
    assert tokens_seen([3, 3, 2.9], min_p=1.0) == {0, 1}


def test_a_tiny_min_p_still_cuts_what_is_banned():
    assert tokens_seen([0.0, -1.0, -INF], min_p=1e-45) == {0, 1}


# ---- log probabilities and ranks --------------------------------------------------------------------------
def test_raw_log_probabilities_are_of_the_logits_as_given():
    x = rows(np.log([0.5, 0.25, 0.25]))
    out = ts.sample(x, temperature=0, logit_bias={2: 50}, token_bitmask=np.array([[6]], np.int32), logprobs=3)
    assert out.tokens.tolist() == [2]
    assert out.ranks.tolist() == [3]
    assert out.top_tokens.tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(out.logprobs, np.log([0.25]), rtol=1e-6)
    np.testing.assert_allclose(out.top_logprobs, np.log([[0.5, 0.25, 0.25]]), rtol=1e-6)


def test_processed_log_probabilities_are_of_what_was_drawn_from():
    x = rows(np.log([0.4, 0.3, 0.2, 0.1]))
    out = ts.sample(x, top_k=2, seed=1, logprobs=4, logprobs_mode="processed")
    assert out.top_tokens.tolist() == [[0, 1, 2, 3]]
    np.testing.assert_allclose(np.exp(out.top_logprobs), [[4 / 7, 3 / 7, 0, 0]], rtol=1e-6)
    assert out.ranks.tolist() == [1 + out.tokens[0]]


def test_processed_log_probabilities_of_a_greedy_row_are_after_the_penalties_and_untempered():
    out = ts.sample(
        rows([1.0, 1.0]),
        temperature=0,
        top_k=1,
        logit_bias={1: math.log(3)},
        logprobs=2,
        logprobs_mode="processed",
    )
    np.testing.assert_allclose(np.exp(out.top_logprobs), [[0.75, 0.25]], rtol=1e-6)


def test_ranks_count_by_value_and_then_by_id():
    x = np.broadcast_to(rows([1, 3, 3, 2, 3]), (200, 5))
    out = ts.sample(x, seed=1, position=np.arange(200), logprobs=5)
    assert out.top_tokens[0].tolist() == [1, 2, 4, 3, 0]
    where = {token: rank for rank, token in enumerate([1, 2, 4, 3, 0], 1)}
    assert out.ranks.tolist() == [where[t] for t in out.tokens.tolist()]


# ---- rows that cannot be sampled
# ----------------------------------------------------------------------------
BAD_ROWS = {"nan": (NAN, 1), "minus_nan": (-NAN, 1), "plus_inf": (INF, 1), "all_minus_inf": (-INF, 2)}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab_size", [1, 31, 300, 5000, 40000])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_has_its_status_and_leaves_its_neighbours_alone(kind, dtype, vocab_size, temperature):
    torch = pytest.importorskip("torch")
    value, status = BAD_ROWS[kind]
    good = torch.from_numpy(np.random.default_rng(1).standard_normal((5, vocab_size))).to(
        getattr(torch, dtype)
    )
    arguments = {
        "temperature": temperature,
        "seed": list(range(5)),
        "logprobs": 2,
        "top_p": 0.9,
        "check": False,
    }
    want = [a.clone() for a in ts.sample(good, **arguments)]
    for place in {0, vocab_size // 2, vocab_size - 1}:
        bad = good.clone()
        bad[2, slice(None) if kind == "all_minus_inf" else place] = value
        got = ts.sample(bad, **arguments)
        assert got.status.tolist() == [0, 0, status, 0, 0]
        assert got.tokens[2] == -1
        assert got.ranks[2] == 0
        assert math.isnan(got.logprobs[2])
        assert got.top_tokens[2].tolist() == [-1, -1]
        assert torch.isnan(got.top_logprobs[2]).all()
        others = torch.tensor([0, 1, 3, 4])
        assert_same([a[others] for a in got], [a[others] for a in want])


def test_nan_fails_a_row_even_where_it_is_banned():
    x = rows([1, 2, NAN], [1, 2, INF])
    out = ts.sample(
        x, logit_bias={2: -INF}, token_bitmask=np.array([[3], [3]], np.int32), top_k=1, check=False
    )
    assert out.status.tolist() == [1, 1]


def test_a_row_whose_every_token_is_banned_has_status_2():
    x = rows([1, 2], [1, 2], [-INF, 2])
    out = ts.sample(x, logit_bias=[{0: -INF, 1: -INF}, {0: -INF}, {1: -INF}], check=False, seed=1)
    assert out.status.tolist() == [2, 0, 2]
    assert out.tokens.tolist() == [-1, 1, -1]


def test_bad_rows_raise_on_the_cpu_unless_told_otherwise():
    x = rows([1, 2], [1, NAN], [-INF, -INF])
    for check in (None, True):
        with pytest.raises(
            ValueError, match=r"tokenstep\.sample: logits\[1\] holds NaN or \+inf.*1 more row fails"
        ):
            ts.sample(x, check=check)
        with pytest.raises(ValueError, match=r"tokenstep\.apply_logits: logits\[1\] holds NaN"):
            ts.apply_logits(x, check=check)
    with pytest.raises(ValueError, match=r"logits\[0\] has no token left with a finite value"):
        ts.sample(x[2:])
    assert ts.sample(x, check=False).status.tolist() == [0, 1, 2]


@pytest.mark.parametrize("vocab_size", [1, 5, 31, 33, 63, 65, 255, 257, 1000, 4099])
def test_no_token_outside_the_vocabulary_is_ever_returned(vocab_size):
    # The memory behind each row would win if it were read.
    wide = np.full((64, vocab_size + 300), 100.0, np.float32)
    wide[:, :vocab_size] = np.random.default_rng(2).standard_normal((64, vocab_size))
    for arguments in ({}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.99}, {"min_p": 1e-9}):
        out = ts.sample(wide[:, :vocab_size], seed=1, position=np.arange(64), logprobs=20, **arguments)
        assert out.tokens.min() >= 0
        assert out.tokens.max() < vocab_size
        assert out.top_tokens.max() < vocab_size


def test_the_last_token_can_be_drawn():
    for vocab_size in (1, 2, 31, 33, 257, 4099):
        x = np.full((1, vocab_size), -50.0, np.float32)
        x[0, -1] = 0
        assert ts.sample(x, seed=1).tokens[0] == vocab_size - 1
