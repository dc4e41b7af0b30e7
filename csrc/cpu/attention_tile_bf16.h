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
  using Query = uint32_t;   // two dimensions
  using Weight = uint16_t;  // bfloat16
  using Packed = uint32_t;  // two dimensions of a key, or two tokens' values

  static int packed_dims(int head_dim) { return (head_dim + 15) / 16 * 16; }
  static int query_length(int head_dim) { return head_dim / 2; }

  static void pack_query(const float* head, int head_dim, Query* out) {
    auto* rounded = reinterpret_cast<BFloat*>(out);
    for (int d = 0; d < head_dim; ++d) narrow(head[d], rounded[d]);  // exact: the head was rounded before
  }

  TOKENSTEP_VEC __m512i load_dims(const BFloat* p, int count) {
    if (count >= 32) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi16((1u << count) - 1, p);
  }

  // keys[d / 2][token]
  static void pack_keys(const BFloat* const* rows, int head_dim, Packed* keys) {
    for (int token = 0; token < kTileTokens; token += 16)
      for (int d = 0; d < head_dim; d += 32) {
        __m512i block[16];
        for (int i = 0; i < 16; ++i) block[i] = load_dims(rows[token + i] + d, head_dim - d);
        transpose(block);
        const int pairs = head_dim - d < 32 ? (head_dim - d) / 2 : 16;
        for (int i = 0; i < 16; ++i)
          if (i < pairs) _mm512_store_si512(keys + (d / 2 + i) * kTileTokens + token, block[i]);
      }
  }

  // values[token / 2][d]
  static void pack_values(const BFloat* const* rows, int head_dim, Packed* values) {
    const int width = packed_dims(head_dim);
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 32; ++i) {
      order[0][i] = static_cast<uint16_t>(i / 2 + 32 * (i % 2));
      order[1][i] = static_cast<uint16_t>(order[0][i] + 16);
    }
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    for (int token = 0; token < kTileTokens; token += 2)
      for (int d = 0; d < head_dim; d += 32) {
        const __m512i a = load_dims(rows[token] + d, head_dim - d),
                      b = load_dims(rows[token + 1] + d, head_dim - d);
        Packed* out = values + token / 2 * width + d;
        _mm512_store_si512(out, _mm512_permutex2var_epi16(a, low, b));
        if (d + 16 < head_dim) _mm512_store_si512(out + 16, _mm512_permutex2var_epi16(a, high, b));
      }
  }

  static bool all_finite(const Packed* values, int head_dim) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 found = 0;
    for (int i = 0; i < packed_dims(head_dim) * kTileTokens / 2; i += 16)
      found |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_load_si512(values + i), exponent), exponent);
    return found == 0;
  }

  TOKENSTEP_VEC void store_weights(Weight* out, Floats p) {
    const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(p));
    memcpy(out, &rounded, sizeof rounded);
  }

  template <int Rows>
  static void score(const Query* queries, const Packed* keys, int head_dim, float* scores) {
    const int pairs = head_dim / 2;
    for (int first = 0; first < kTileVectors; first += kVectorBlock) {
      Floats sum[Rows][kVectorBlock] = {};
      for (int d = 0; d < pairs; ++d) {
        __m512i key[kVectorBlock];
        for (int v = 0; v < kVectorBlock; ++v)
          key[v] = _mm512_load_si512(keys + d * kTileTokens + (first + v) * 16);
        for (int r = 0; r < Rows; ++r) {
          const __m512i query = _mm512_set1_epi32(static_cast<int>(queries[r * pairs + d]));
          for (int v = 0; v < kVectorBlock; ++v) sum[r][v] = dot_pairs(query, key[v], sum[r][v]);
        }
      }
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kVectorBlock; ++v) store(scores + r * kTileTokens + (first + v) * 16, sum[r][v]);
    }
  }

  template <int Rows>
  static void accumulate(const Weight* weights, const Packed* values, const float* alpha, int head_dim,
                         float* outputs) {
    const int width = packed_dims(head_dim);
    for (int first = 0; first < width; first += 4 * 16) {
      const int left = (width - first) / 16;
      with_constant<4>(left < 4 ? left : 4, [&](auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        Floats sum[Rows][kVectors];
        for (int r = 0; r < Rows; ++r)
          for (int v = 0; v < kVectors; ++v)
            sum[r][v] = load(outputs + r * width + first + v * 16) * alpha[r];
        for (int pair = 0; pair < kTileTokens / 2; ++pair) {
          __m512i value[kVectors];
          for (int v = 0; v < kVectors; ++v)
            value[v] = _mm512_load_si512(values + pair * width + first + v * 16);
          for (int r = 0; r < Rows; ++r) {
            int two;
            memcpy(&two, weights + r * kTileTokens + 2 * pair, sizeof two);
            const __m512i weight = _mm512_set1_epi32(two);
            for (int v = 0; v < kVectors; ++v) sum[r][v] = dot_pairs(weight, value[v], sum[r][v]);
          }
        }
        for (int r = 0; r < Rows; ++r)
          for (int v = 0; v < kVectors; ++v) store(outputs + r * width + first + v * 16, sum[r][v]);
      });
    }
  }
};

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
#endif
