// The two products of attention over one tile of keys, in float32: S = Q K^T and O = O * alpha + P V.
//
// A tile is kTileTokens keys and values at a fixed absolute position, read where they lie in their pages. A
// score is the sum of eight chains of multiply-adds over the head dimension (attention_lanes.h), an output
// one chain over the tokens. Neither order depends on how many rows of Q share the tile: rows are blocked in
// registers only to reuse what is loaded. On the way, the lines of a later tile are fetched. For
// attention_kernel.cpp alone.
#pragma once
#include <type_traits>

#include "cpu/attention_lanes.h"
#include "cpu/vec.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

constexpr int kTileTokens = 32;
constexpr int kTileVectors = kTileTokens / kLanes;

// Register blocking: kRowBlock rows by kVectorBlock vectors of sums, and what they are made of, fit the
// register file.
#if defined(__AVX512F__)
constexpr int kRowBlock = 6;
#else
constexpr int kRowBlock = 3;
#endif
constexpr int kVectorBlock = 4;

constexpr int kCacheLine = 64;

// Keys or values of a later tile, whose lines are fetched into L2 while this one is computed. Requests are
// spread over the work, for the memory system can hold few at a time.
template <class T>
struct Later {
  const T* const* tokens;  // null: nothing to fetch
  int64_t head_offset;

  Later from(int token) const { return {tokens ? tokens + token : nullptr, head_offset}; }

  // Lines of dimensions [d, d + Dims) of a token.
  template <int Dims>
  void fetch_dims(int token, int d) const {
    if (!tokens) return;
    for (int i = 0; i < Dims; i += kCacheLine / sizeof(T)) fetch(token, d + i);
  }

  // For a loop that goes through Tokens tokens by Dims dimensions, less than a line: of each line of all
  // these tokens, the share of the step at d.
  template <int Tokens, int Dims>
  void fetch_share(int first, int d) const {
    if (!tokens) return;
    constexpr int kSteps = kCacheLine / (Dims * static_cast<int>(sizeof(T)));
    constexpr int kShare = Tokens < kSteps ? Tokens : Tokens / kSteps;
    const int step = d / Dims % kSteps, line = d / (Dims * kSteps) * (Dims * kSteps);
    if (kShare * step >= Tokens) return;
    for (int i = 0; i < kShare; ++i) fetch(first + kShare * step + i, line);
  }

 private:
  void fetch(int token, int d) const { __builtin_prefetch(tokens[token] + head_offset + d, 0, 2); }
};

// f(0) ... f(N - 1), unrolled: only then does GCC keep an array of sums in registers.
template <int N, class F>
TOKENSTEP_VEC void unroll(F&& f) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) f(i);
}

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

// Vectors of partial sums that one pass over the dimensions keeps in registers.
constexpr int score_vectors(int rows) {
  int vectors = kGroupVectors;
  while (vectors * rows > kRowBlock * kVectorBlock) vectors /= 2;
  return vectors;
}

// Tokens of a tile as their rows in the cache, of element type T.
template <class T>
struct FloatTile {
  using Element = T;
  using Query = float;   // one element of a packed query row
  using Weight = float;  // one element of a row of P
  static constexpr bool kWidens = sizeof(T) < sizeof(float);

  static constexpr int query_length(int head_dim) { return head_dim; }
  static constexpr int output_length(int head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }

  static void pack_query(const float* head, int head_dim, Query* out) {
    memcpy(out, head, sizeof(float) * head_dim);
  }

  static bool all_finite(const T* const* values, int head_dim) {
    Floats sum{};  // 0 * x is NaN for an infinity and for NaN
    for (int token = 0; token < kTileTokens; ++token)
      for (int d = 0; d < head_dim; d += kLanes) sum += load_first(values[token] + d, head_dim - d) * 0.0f;
    float total = 0.0f;
    for (int i = 0; i < kLanes; ++i) total += sum[i];
    return total == 0.0f;
  }

  TOKENSTEP_VEC void store_weights(Weight* out, Floats p) { store(out, p); }

  // scores[row][token] for Rows rows.
  template <int Rows>
  static void score(const Query* queries, const T* const* keys, Later<T> later, int head_dim, float* scores) {
    constexpr int kStep = score_vectors(Rows);
    for (int group = 0; group < kTileTokens; group += kLanes) {
      Floats sums[Rows][kGroupVectors];
      for (int vector = 0; vector < kGroupVectors; vector += kStep)
        score_vectors_of<Rows, kStep>(queries, keys + group, vector, later.from(group), head_dim, sums);
      unroll<Rows>([&](int r) { store(scores + r * kTileTokens + group, add_partials(sums[r])); });
    }
  }

  // outputs[row][d] = outputs[row][d] * alpha[row] + sum over tokens of weights[row][token] *
  // values[token][d]
  template <int Rows>
  static void accumulate(const Weight* weights, const T* const* values, Later<T> later, const float* alpha,
                         int head_dim, float* outputs) {
    const int width = output_length(head_dim);
    for (int d = 0; d < width; d += kVectorBlock * kLanes) {
      const int left = (width - d) / kLanes;
      with_constant<kVectorBlock>(left < kVectorBlock ? left : kVectorBlock, [=](auto vectors) {
        accumulate_vectors<Rows, vectors>(weights, values, later, alpha, d, head_dim, outputs);
      });
    }
  }

  static void restore_order(float*, int) {}  // outputs are in the order of dimensions as they are

 private:
  template <int Rows, int Vectors>
  TOKENSTEP_VEC void score_vectors_of(const Query* queries, const T* const* keys, int first, Later<T> later,
                                      int head_dim, Floats (&sums)[Rows][kGroupVectors]) {
    Floats sum[Rows][Vectors] = {};
    for (int d = 0; d < head_dim; d += kPartials) {
      later.template fetch_share<tokens_of(Vectors), kPartials>(tokens_of(first), d);
      Floats query[Rows][kVectorsPerToken];
      unroll<Rows>([&](int r) {
        unroll<kVectorsPerToken>([&](int v) { query[r][v] = load_query(queries + r * head_dim, v, d); });
      });
      unroll<Vectors>([&](int v) {
        const Floats key = load_keys(keys, first + v, d);
        unroll<Rows>(
            [&](int r) { sum[r][v] = multiply_add(query[r][v % kVectorsPerToken], key, sum[r][v]); });
      });
    }
    unroll<Rows>([&](int r) { unroll<Vectors>([&](int v) { sums[r][first + v] = sum[r][v]; }); });
  }

  template <int Rows, int Vectors>
  static void accumulate_vectors(const Weight* weights, const T* const* values, Later<T> later,
                                 const float* alpha, int first, int head_dim, float* outputs) {
    const int width = output_length(head_dim);
    Floats sum[Rows][Vectors];
    unroll<Rows>([&](int r) {
      unroll<Vectors>([&](int v) { sum[r][v] = load(outputs + r * width + first + v * kLanes) * alpha[r]; });
    });
    for (int token = 0; token < kTileTokens; ++token) {
      later.template fetch_dims<Vectors * kLanes>(token, first);
      Floats weight[Rows];
      unroll<Rows>([&](int r) { weight[r] = all(weights[r * kTileTokens + token]); });
      unroll<Vectors>([&](int v) {
        const int d = first + v * kLanes;
        const T* p = values[token] + d;
        const Floats value = v + 1 < Vectors ? load(p) : load_first(p, head_dim - d);
        unroll<Rows>([&](int r) { sum[r][v] = multiply_add(weight[r], value, sum[r][v]); });
      });
    }
    unroll<Rows>([&](int r) {
      unroll<Vectors>([&](int v) { store(outputs + r * width + first + v * kLanes, sum[r][v]); });
    });
  }
};

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
