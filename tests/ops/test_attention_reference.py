"""The float64 reference of attention against cases that can be worked out by hand, and against torch's dense
attention in float64: it shares nothing with either."""

import math

import numpy as np
import pytest
from attention_cases import Heads, Sequence, paged, random_sequence, torch, visible

from tokenstep.reference import attention as reference


def attend(sequence, **options):
    return paged([sequence], "float32", block_size=3).expected(**options)


def sequence_of(scores, values):
    """One query of ones whose scores are as given: heads of 8 dimensions, the first of which holds them."""
    keys = np.zeros((len(scores), 1, 8), np.float32)
    keys[:, 0, 0] = scores
    rows = np.repeat(np.float32(values)[:, None, None], 8, 2)
    return Sequence(np.ones((1, 1, 8), np.float32), keys, rows)


def test_a_single_key_gives_its_value_and_its_score():
    out, lse = attend(sequence_of([0.7], [5.0]), scale=2.0)
    assert (out == 5.0).all()
    np.testing.assert_allclose(lse, np.float32(0.7) * 2.0)


def test_equal_scores_give_the_mean_of_the_values():
    out, lse = attend(sequence_of([1.0] * 4, [1, 2, 3, 6]), scale=1.0)
    np.testing.assert_allclose(out, 3.0)
    np.testing.assert_allclose(lse, 1.0 + math.log(4))


def test_weights_are_exponentials_of_scores():
    out, lse = attend(sequence_of([0.0, math.log(3.0)], [0, 1]), scale=1.0)
    np.testing.assert_allclose(out, 0.75, rtol=1e-7)
    np.testing.assert_allclose(lse, math.log(4.0), rtol=1e-7)


def test_scale_is_one_over_the_root_of_head_dim_by_default():
    s = sequence_of([0.0, 4.0], [0, 1])
    for got, want in zip(attend(s), attend(s, scale=8**-0.5), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_window_keeps_that_many_keys_the_query_s_own_included():
    out, lse = attend(sequence_of([1.0] * 5, [9, 9, 9, 2, 4]), window=2, scale=0.0)
    assert (out == 3.0).all()
    np.testing.assert_allclose(lse, math.log(2))


def test_softcap_comes_after_the_scale():
    _, lse = attend(sequence_of([6.0], [1.0]), scale=0.5, softcap=2.0)
    np.testing.assert_allclose(lse, 2 * math.tanh(1.5))


def test_alibi_adds_the_slope_times_the_distance_after_softcap():
    s = sequence_of([6.0, 6.0, 6.0], [0, 0, 1])
    out, _ = attend(s, scale=1.0, softcap=1e-9, alibi_slopes=np.float32([math.log(2)]))
    np.testing.assert_allclose(out, 1 / (1 + 1 / 2 + 1 / 4), rtol=1e-6)


def test_a_sink_takes_its_share_and_is_not_scaled():
    out, lse = attend(sequence_of([8.0], [1.0]), scale=0.0, sinks=np.float32([math.log(3)]))
    np.testing.assert_allclose(out, 0.25, rtol=1e-7)
    np.testing.assert_allclose(lse, math.log(4), rtol=1e-7)


def test_a_sequence_of_length_zero_gives_zeros_and_minus_infinity():
    empty = Sequence(np.ones((1, 1, 8), np.float32), *np.ones((2, 0, 1, 8), np.float32))
    out, lse = attend(empty, sinks=np.float32([1.0]))
    assert (out == 0).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("heads", [Heads(6, 2, 16), Heads(5, 1, 8), Heads(3, 3, 24)], ids=str)
@pytest.mark.parametrize("window", [None, 4])
def test_it_equals_dense_attention_of_torch_in_float64(heads, window):
    rng = np.random.default_rng(0)
    sequences = [random_sequence(rng, "float32", heads, n, m) for n, m in [(7, 1), (1, 1), (20, 6), (5, 5)]]
    batch = paged(sequences, "float32", block_size=3)
    out, lse = batch.expected(window=window)
    for s, got, got_lse in zip(sequences, batch.split(out), batch.split(lse), strict=True):
        q, k, v = (torch.from_numpy(x).double().transpose(0, 1) for x in (s.q, s.k, s.v))
        mask = torch.from_numpy(visible(s, window))
        want = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, enable_gqa=True
        )[0]
        np.testing.assert_allclose(got, want.transpose(0, 1), rtol=1e-12)
        keys = k.repeat_interleave(heads.num_heads // heads.num_kv_heads, 0)
        scores = (q @ keys.mT * heads.head_dim**-0.5).masked_fill(~mask, -torch.inf)
        np.testing.assert_allclose(got_lse, scores.logsumexp(-1).T, rtol=1e-12)


def test_rotation_is_multiplication_by_a_unit_complex_number():
    rng = np.random.default_rng(1)
    x, angles = rng.standard_normal((5, 2, 12)), rng.standard_normal((40, 4))
    positions = np.array([3, 0, 39, 7, 7])
    for interleaved in (False, True):
        got = reference.rotate(x, positions, np.cos(angles), np.sin(angles), interleaved)
        first, second = (x[..., 0:8:2], x[..., 1:8:2]) if interleaved else (x[..., :4], x[..., 4:8])
        turned = (first + 1j * second) * np.exp(1j * angles[positions])[:, None]
        pairs = (got[..., 0:8:2], got[..., 1:8:2]) if interleaved else (got[..., :4], got[..., 4:8])
        np.testing.assert_allclose(pairs, (turned.real, turned.imag), atol=1e-14)
        np.testing.assert_array_equal(got[..., 8:], x[..., 8:])


def test_appended_rows_lie_where_their_positions_say():
    k = np.arange(1.0, 4.0)[:, None, None] * np.ones((3, 1, 8))
    k_cache, v_cache = np.zeros((2, 4, 2, 1, 8))
    table, lengths, start = np.array([[2, 0], [3, -1]]), np.array([3, 1]), np.array([0, 2, 3])
    reference.append_kv(k, -k, k_cache, v_cache, table, lengths, start)
    want = np.zeros((4, 2))
    want[2, 1], want[0, 0], want[3, 0] = 1, 2, 3  # positions 1 and 2 of the first, 0 of the second
    np.testing.assert_array_equal(k_cache[..., 0, 0], want)
    np.testing.assert_array_equal(v_cache[..., 0, 0], -want)


def test_merging_parts_gives_attention_over_all_their_keys():
    rng = np.random.default_rng(2)
    s = random_sequence(rng, "float32", Heads(4, 2, 8), 30)
    whole = attend(s)
    parts = [attend(Sequence(s.q, s.k[a:b], s.v[a:b])) for a, b in [(0, 7), (7, 8), (8, 30)]]
    empty = (np.full_like(whole[0], np.nan), np.full_like(whole[1], -np.inf))
    merged = reference.merge_attention(*(np.stack(x) for x in zip(*parts, empty, strict=True)))
    for got, want in zip(merged, whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)
