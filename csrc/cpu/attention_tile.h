// The two products of attention over one tile of keys, for any type, in float32: S = Q K^T and O = O * alpha
// + P V.
//
// A tile is kTileTokens keys and values at a fixed absolute position. Keys are packed transposed, so that a
// lane is a token and a score is one chain of multiply-adds over the head dimension; values are packed as
// rows, so that a lane is a dimension and an output is one chain over the tokens. Neither order depends on
// how many rows of Q share the tile: rows are blocked in registers only to reuse what is loaded. For
// attention_kernel.cpp alone.
#pragma once
#include <type_traits>

#include "cpu/attention_transpose.h"
#include "cpu/attention_vec.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

constexpr int kTileTokens = 32;
constexpr int kTileVectors = kTileTokens / kLanes;

// Register blocking: kRowBlock * kVectorBlock sums, and what they are made of, fit the register file.
#if defined(__AVX512F__)
constexpr int kRowBlock = 6;
#elif defined(__aarch64__)
constexpr int kRowBlock = 5;
#else
constexpr int kRowBlock = 3;
#endif
constexpr int kVectorBlock = kTileVectors < 4 ? kTileVectors : 4;

// Calls f with the integer n, 1 <= n <= Max, as a constant.
template <int Max, class F>
TOKENSTEP_VEC void with_constant(int n, F&& f) {
  if constexpr (Max > 1) {
    if (n < Max) return with_constant<Max - 1>(n, f);
  }
  f(std::integral_constant<int, Max>{});
}

// Calls f(first, constant count) for blocks of rows of nearly equal size.
template <class F>
TOKENSTEP_VEC void for_row_blocks(int begin, int end, F&& f) {
  for (int row = begin; row < end;) {
    const int blocks = (end - row + kRowBlock - 1) / kRowBlock;
    const int count = (end - row + blocks - 1) / blocks;
    with_constant<kRowBlock>(count, [&](auto rows) { f(row, rows); });
    row += count;
  }
}

struct FloatTile {
  using Query = float;   // one element of a packed query row
  using Weight = float;  // one element of a row of P

  static int packed_dims(int head_dim) {
    return (head_dim + kLanes - 1) / kLanes * kLanes;
  }  // zeros fill the last
  static int query_length(int head_dim) { return head_dim; }
  static int keys_length(int head_dim) { return packed_dims(head_dim) * kTileTokens; }
  static int values_length(int head_dim) { return packed_dims(head_dim) * kTileTokens; }
  using Packed = float;

  static void pack_query(const float* head, int head_dim, Query* out) {
    memcpy(out, head, sizeof(float) * head_dim);
  }

  // keys[d][token]
  template <class T>
  static void pack_keys(const T* const* rows, int head_dim, Packed* keys) {
    for (int token = 0; token < kTileTokens; token += kLanes)
      for (int d = 0; d < head_dim; d += kLanes) {
        Floats block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = load_first(rows[token + i] + d, head_dim - d);
        transpose(block);
        for (int i = 0; i < kLanes; ++i) store(keys + (d + i) * kTileTokens + token, block[i]);
      }
  }

  // values[token][d]
  template <class T>
  static void pack_values(const T* const* rows, int head_dim, Packed* values) {
    const int width = packed_dims(head_dim);
    for (int token = 0; token < kTileTokens; ++token)
      for (int d = 0; d < head_dim; d += kLanes)
        store(values + token * width + d, load_first(rows[token] + d, head_dim - d));
  }

  static bool all_finite(const Packed* values, int head_dim) {
    Floats sum{};  // 0 * x is NaN for an infinity and for NaN
    for (int i = 0; i < values_length(head_dim); i += kLanes) sum += load(values + i) * 0.0f;
    return sum_lanes(sum) == 0.0f;
  }

  TOKENSTEP_VEC void store_weights(Weight* out, Floats p) { store(out, p); }

  // scores[row][token] for Rows rows.
  template <int Rows>
  static void score(const Query* queries, const Packed* keys, int head_dim, float* scores) {
    for (int first = 0; first < kTileVectors; first += kVectorBlock) {
      Floats sum[Rows][kVectorBlock] = {};
      for (int d = 0; d < head_dim; ++d) {
        Floats key[kVectorBlock];
        for (int v = 0; v < kVectorBlock; ++v) key[v] = load(keys + d * kTileTokens + (first + v) * kLanes);
        for (int r = 0; r < Rows; ++r) {
          const Floats query = all(queries[r * head_dim + d]);
          for (int v = 0; v < kVectorBlock; ++v) sum[r][v] = multiply_add(query, key[v], sum[r][v]);
        }
      }
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kVectorBlock; ++v)
          store(scores + r * kTileTokens + (first + v) * kLanes, sum[r][v]);
    }
  }

  // outputs[row][d] = outputs[row][d] * alpha[row] + sum over tokens of weights[row][token] *
  // values[token][d]
  template <int Rows>
  static void accumulate(const Weight* weights, const Packed* values, const float* alpha, int head_dim,
                         float* outputs) {
    const int width = packed_dims(head_dim);
    for (int first = 0; first < width; first += kVectorBlock * kLanes) {
      const int left = (width - first) / kLanes;
      with_constant<kVectorBlock>(left < kVectorBlock ? left : kVectorBlock, [&](auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        Floats sum[Rows][kVectors];
        for (int r = 0; r < Rows; ++r)
          for (int v = 0; v < kVectors; ++v)
            sum[r][v] = load(outputs + r * width + first + v * kLanes) * alpha[r];
        for (int token = 0; token < kTileTokens; ++token) {
          Floats value[kVectors];
          for (int v = 0; v < kVectors; ++v) value[v] = load(values + token * width + first + v * kLanes);
          for (int r = 0; r < Rows; ++r) {
            const Floats weight = all(weights[r * kTileTokens + token]);
            for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(weight, value[v], sum[r][v]);
          }
        }
        for (int r = 0; r < Rows; ++r)
          for (int v = 0; v < kVectors; ++v) store(outputs + r * width + first + v * kLanes, sum[r][v]);
      });
    }
  }
};

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
