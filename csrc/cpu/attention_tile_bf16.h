// The two products of attention over one tile of bfloat16 keys and values with the CPU's own bfloat16 dot
// (vdpbf16ps): two products and their sum a lane and step, accumulated in float32. The same interface,
// blocking and order as FloatTile, with pairs in the place of elements: pairs of dimensions for scores, pairs
// of tokens for outputs. Weights are rounded to bfloat16 (their sum, in update_row, is of the unrounded
// ones). For attention_kernel.cpp alone.
#pragma once
#include "cpu/attention_tile.h"

#if defined(__AVX512BF16__)
namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

TOKENSTEP_VEC Floats dot_pairs(__m512i a, __m512i b, Floats sum) {
  return reinterpret_cast<Floats>(_mm512_dpbf16_ps(
      reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}

struct BFloatTile {
  using Element = BFloat;
  using Query = BFloat;
  using Weight = uint16_t;  // bfloat16
  static constexpr bool kWidens = false;

  static constexpr int kDims = 2 * kPartials;  // dimensions of one token in a vector of keys

  static constexpr int query_length(int head_dim) { return (head_dim + kDims - 1) / kDims * kDims; }
  static constexpr int output_length(int head_dim) { return (head_dim + 31) / 32 * 32; }

  static void pack_query(const float* head, int head_dim, Query* out) {
    for (int d = 0; d < head_dim; ++d) narrow(head[d], out[d]);  // exact: the head was rounded before
    for (int d = head_dim; d < query_length(head_dim); ++d) out[d] = {};
  }

  // Dimensions d ... d + 15 of two tokens; of the last eight, zeros follow.
  template <bool Whole>
  TOKENSTEP_VEC __m512i load_keys(const BFloat* const* tokens, int vector, int d) {
    const auto load_one = [d](const BFloat* p) {
      if constexpr (Whole) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + d));
      return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + d)));
    };
    const BFloat* const* first = tokens + first_token(vector);
    return _mm512_inserti64x4(_mm512_castsi256_si512(load_one(first[0])), load_one(first[kSecondToken]), 1);
  }

  // The first `count` of 32 dimensions, zeros beyond.
  TOKENSTEP_VEC __m512i load_values(const BFloat* p, int count) {
    return _mm512_maskz_loadu_epi16(count < 32 ? (1u << count) - 1 : ~0u, p);
  }

  static bool all_finite(const BFloat* const* values, int head_dim) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 found = 0;
    for (int token = 0; token < kTileTokens; ++token)
      for (int d = 0; d < head_dim; d += 32)
        found |= _mm512_cmpeq_epi16_mask(
            _mm512_and_si512(load_values(values[token] + d, head_dim - d), exponent), exponent);
    return found == 0;
  }

  TOKENSTEP_VEC void store_weights(Weight* out, Floats p) {
    const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(p));
    memcpy(out, &rounded, sizeof rounded);
  }

  template <int Rows>
  static void score(const Query* queries, const BFloat* const* keys, Later<BFloat> later, int head_dim,
                    float* scores) {
    constexpr int kStep = score_vectors(Rows);
    for (int group = 0; group < kTileTokens; group += kLanes) {
      Floats sums[Rows][kGroupVectors];
      for (int vector = 0; vector < kGroupVectors; vector += kStep)
        score_vectors_of<Rows, kStep>(queries, keys + group, vector, later.from(group), head_dim, sums);
      unroll<Rows>([&](int r) { store(scores + r * kTileTokens + group, add_partials(sums[r])); });
    }
  }

  // Two tokens' values are interleaved within 128-bit lanes, the cheapest way: of 32 outputs, the first 16
  // sums are those of dimensions 0-3, 8-11, 16-19 and 24-27, until restore_order.
  template <int Rows>
  static void accumulate(const Weight* weights, const BFloat* const* values, Later<BFloat> later,
                         const float* alpha, int head_dim, float* outputs) {
    for (int d = 0; d < head_dim; d += 64) {
      with_constant<2>(head_dim - d > 32 ? 2 : 1, [=](auto blocks) {
        accumulate_blocks<Rows, blocks>(weights, values, later, alpha, d, head_dim, outputs);
      });
    }
  }

  static void restore_order(float* outputs, int head_dim) {
    for (int d = 0; d < output_length(head_dim); d += 32) {
      const __m512 low = _mm512_loadu_ps(outputs + d), high = _mm512_loadu_ps(outputs + d + 16);
      const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
      const __m512i rest = _mm512_add_epi32(order, _mm512_set1_epi32(8));
      _mm512_storeu_ps(outputs + d, _mm512_permutex2var_ps(low, order, high));
      _mm512_storeu_ps(outputs + d + 16, _mm512_permutex2var_ps(low, rest, high));
    }
  }

 private:
  template <int Rows, int Vectors>
  TOKENSTEP_VEC void score_vectors_of(const Query* queries, const BFloat* const* keys, int first,
                                      Later<BFloat> later, int head_dim,
                                      Floats (&sums)[Rows][kGroupVectors]) {
    Floats sum[Rows][Vectors] = {};
    int d = 0;
    for (; d + kDims <= head_dim; d += kDims)
      add_products<true>(queries, keys, first, later, d, head_dim, sum);
    if (d < head_dim) add_products<false>(queries, keys, first, later, d, head_dim, sum);
    unroll<Rows>([&](int r) { unroll<Vectors>([&](int v) { sums[r][first + v] = sum[r][v]; }); });
  }

  template <bool Whole, int Rows, int Vectors>
  TOKENSTEP_VEC void add_products(const Query* queries, const BFloat* const* keys, int first,
                                  Later<BFloat> later, int d, int head_dim, Floats (&sum)[Rows][Vectors]) {
    later.fetch_share<tokens_of(Vectors), kDims>(tokens_of(first), d);
    __m512i query[Rows];
    unroll<Rows>([&](int r) {
      const Query* p = queries + r * query_length(head_dim) + d;
      query[r] = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    });
    unroll<Vectors>([&](int v) {
      const __m512i key = load_keys<Whole>(keys, first + v, d);
      unroll<Rows>([&](int r) { sum[r][v] = dot_pairs(query[r], key, sum[r][v]); });
    });
  }

  template <int Rows, int Blocks>
  static void accumulate_blocks(const Weight* weights, const BFloat* const* values, Later<BFloat> later,
                                const float* alpha, int first, int head_dim, float* outputs) {
    constexpr int kVectors = 2 * Blocks;
    const int width = output_length(head_dim);
    Floats sum[Rows][kVectors];
    unroll<Rows>([&](int r) {
      unroll<kVectors>([&](int v) { sum[r][v] = load(outputs + r * width + first + v * 16) * alpha[r]; });
    });
    for (int token = 0; token < kTileTokens; token += 2) {
      later.fetch_dims<32 * Blocks>(token, first);
      later.fetch_dims<32 * Blocks>(token + 1, first);
      __m512i weight[Rows];
      unroll<Rows>([&](int r) {
        int pair;
        memcpy(&pair, weights + r * kTileTokens + token, sizeof pair);
        weight[r] = _mm512_set1_epi32(pair);
      });
      unroll<Blocks>([&](int b) {
        const int d = first + 32 * b, count = b + 1 < Blocks ? 32 : head_dim - d;
        const __m512i one = load_values(values[token] + d, count);
        const __m512i two = load_values(values[token + 1] + d, count);
        const __m512i low = _mm512_unpacklo_epi16(one, two), high = _mm512_unpackhi_epi16(one, two);
        unroll<Rows>([&](int r) {
          sum[r][2 * b] = dot_pairs(weight[r], low, sum[r][2 * b]);
          sum[r][2 * b + 1] = dot_pairs(weight[r], high, sum[r][2 * b + 1]);
        });
      });
    }
    unroll<Rows>([&](int r) {
      unroll<kVectors>([&](int v) { store(outputs + r * width + first + v * 16, sum[r][v]); });
    });
  }
};

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
#endif
