// The arithmetic of one warp on one slice of 16 tokens: scores of 16 query rows, weighted values. float16 and
// bfloat16 by tensor cores; float32 by fused multiply-adds, with the same values in the same lanes.
//
// The weighted values lie as mma leaves them: outputs[j] are columns 8 * j + 2 * (l % 4) + {0, 1} of row l /
// 4, then of row l / 4 + 8.
#pragma once
#include "cuda/attention_cache.cuh"
#include "cuda/attention_softmax.cuh"

namespace tokenstep::cuda {

template <int kHeadDim>
using SliceOutputs = float[kHeadDim / 8][4];

// Whether a 16-bit value of the word is an infinity or NaN.
template <class T>
__device__ __forceinline__ bool has_non_finite(uint32_t word);
template <>
__device__ __forceinline__ bool has_non_finite<__half>(uint32_t word) {
  return (word & 0x7c00u) == 0x7c00u || (word & 0x7c000000u) == 0x7c000000u;
}
template <>
__device__ __forceinline__ bool has_non_finite<__nv_bfloat16>(uint32_t word) {
  return (word & 0x7f80u) == 0x7f80u || (word & 0x7f800000u) == 0x7f800000u;
}

template <class T, int kHeadDim>
class SliceMath {
  using Rows = SharedRows<T, kHeadDim>;
  static constexpr int kSteps = kHeadDim / 16;
  // Query fragments stay in registers where there are enough of them; else they are read again for each
  // slice.
  static constexpr bool kKeepsQueries = kHeadDim <= 96;

 public:
  // Once the tile's queries are in shared memory.
  __device__ __forceinline__ void load_queries(const char* queries) {
    queries_ = queries;
    if constexpr (kKeepsQueries) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load_query(step, lane_id(), kept_[step]);
    }
  }

  __device__ __forceinline__ void score(const char* keys, SliceScores& scores) const {
    float sums[2][4] = {};
    const int lane = recomputed(lane_id());
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t query[4], key[4];
      if constexpr (kKeepsQueries) {
#pragma unroll
        for (int i = 0; i < 4; ++i) query[i] = kept_[step][i];
      } else {
        load_query(step, lane, query);
      }
      load_matrix_x4(key, Rows::piece(keys, lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t half[2] = {key[2 * n], key[2 * n + 1]};
        mma_m16n8k16<T>(sums[n], query, half);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores.of[i / 2][n][i % 2] = sums[n][i];
  }

  // `mixed`: some rows of the tile do not see tokens that others see.
  __device__ __forceinline__ void accumulate(const char* values, const SliceScores& weights,
                                             const float (&alpha)[2], const TileRows& rows,
                                             const ScoreRules& rules, int slice, bool mixed,
                                             SliceOutputs<kHeadDim>& outputs) const {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = narrow_pair<T>(weights.of[i % 2][i / 2][0], weights.of[i % 2][i / 2][1]);
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) outputs[j][i] *= alpha[i / 2];
    if (mixed && !all_finite(values)) return accumulate_by_position(values, a, rows, rules, slice, outputs);
    const int lane = recomputed(lane_id());
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t value[4];
      load_values(values, step, lane, value);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t half[2] = {value[2 * n], value[2 * n + 1]};
        mma_m16n8k16<T>(outputs[2 * step + n], a, half);
      }
    }
  }

 private:
  __device__ __forceinline__ void load_query(int step, int lane, uint32_t (&query)[4]) const {
    load_matrix_x4(query, Rows::piece(queries_, lane % 16, 2 * step + lane / 16));
  }
  __device__ __forceinline__ static void load_values(const char* values, int step, int lane,
                                                     uint32_t (&value)[4]) {
    load_matrix_x4_transposed(value, Rows::piece(values, lane % 16, 2 * step + lane / 16));
  }

  __device__ __forceinline__ static bool all_finite(const char* values) {
    bool found = false;
#pragma unroll
    for (int i = 0; i < kSliceTokens * Rows::kPieces / kWarpSize; ++i) {
      const int number = i * kWarpSize + lane_id();
      const uint4 words = *reinterpret_cast<const uint4*>(
          Rows::piece(values, number / Rows::kPieces, number % Rows::kPieces));
      found |= has_non_finite<T>(words.x) || has_non_finite<T>(words.y) || has_non_finite<T>(words.z) ||
               has_non_finite<T>(words.w);
    }
    return !__any_sync(kAllLanes, found);
  }

  // A weight of 0 does not silence an infinity or NaN: the rows of each position get values in which what
  // they do not see is 0, and have the bits that they would have alone.
  __device__ __forceinline__ static void accumulate_by_position(const char* values, const uint32_t (&a)[4],
                                                                const TileRows& rows, const ScoreRules& rules,
                                                                int slice, SliceOutputs<kHeadDim>& outputs) {
    const int lane = recomputed(lane_id());
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t value[4];
      load_values(values, step, lane, value);
#pragma unroll 1
      for (int position = rows.first_position; position <= rows.last_position; ++position) {
        const int begin = static_cast<int>(first_key(position, rows.params.op.window));
        uint32_t seen[2];  // of the tokens of a fragment's two registers
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int token = slice + token_in_slice(n, 0);
          seen[n] = (token >= begin && token <= position ? 0xffffu : 0u) |
                    (token + 1 >= begin && token + 1 <= position ? 0xffff0000u : 0u);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const uint32_t half[2] = {value[2 * n] & seen[0], value[2 * n + 1] & seen[1]};
          float result[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) result[i] = outputs[2 * step + n][i];
          mma_m16n8k16<T>(result, a, half);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (rules.position(i / 2) == position) outputs[2 * step + n][i] = result[i];
        }
      }
    }
  }

  const char* queries_ = nullptr;
  uint32_t kept_[kKeepsQueries ? kSteps : 1][4];
};

// float32: no tensor core multiplies it exactly enough.
template <int kHeadDim>
class SliceMath<float, kHeadDim> {
  using Rows = SharedRows<float, kHeadDim>;

 public:
  __device__ __forceinline__ void load_queries(const char* queries) { queries_ = queries; }

  __device__ __forceinline__ void score(const char* keys, SliceScores& scores) const {
    // Four partial sums: short chains keep the rounding error of sharp weights small.
    float4 sums[2][2][2] = {};
#pragma unroll 2
    for (int piece = 0; piece < Rows::kPieces; ++piece) {
      float4 query[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) query[r] = load(queries_, lane_id() / 4 + 8 * r, piece);
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 key = load(keys, token_in_slice(n, i), piece);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float4& sum = sums[r][n][i];
            sum.x = __fmaf_rn(query[r].x, key.x, sum.x);
            sum.y = __fmaf_rn(query[r].y, key.y, sum.y);
            sum.z = __fmaf_rn(query[r].z, key.z, sum.z);
            sum.w = __fmaf_rn(query[r].w, key.w, sum.w);
          }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 sum = sums[r][n][i];
          scores.of[r][n][i] = (sum.x + sum.y) + (sum.z + sum.w);
        }
  }

  __device__ __forceinline__ void accumulate(const char* values, const SliceScores& weights,
                                             const float (&alpha)[2], const TileRows&,
                                             const ScoreRules& rules, int slice, bool mixed,
                                             SliceOutputs<kHeadDim>& outputs) const {
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) outputs[j][i] *= alpha[i / 2];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll 1
        for (int owner = 0; owner < 4; ++owner) {  // the lane of each row that has this token's weight
          const int token = n * 8 + owner * 2 + i;
          float weight[2];
          bool sees[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            weight[r] = __shfl_sync(kAllLanes, weights.of[r][n][i], owner, 4);
            sees[r] = !mixed || rules.sees(r, slice + token);
          }
#pragma unroll
          for (int j = 0; j < kHeadDim / 8; ++j) {
            const float2 value = load_pair(values, token, j);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              float* const out = outputs[j] + 2 * r;
              if (sees[r]) {
                out[0] = __fmaf_rn(weight[r], value.x, out[0]);
                out[1] = __fmaf_rn(weight[r], value.y, out[1]);
              }
            }
          }
        }
  }

 private:
  __device__ __forceinline__ static float4 load(const char* rows, int row, int piece) {
    return *reinterpret_cast<const float4*>(Rows::piece(rows, row, piece));
  }
  __device__ __forceinline__ static float2 load_pair(const char* rows, int row, int j) {
    const int column = 8 * j + lane_id() % 4 * 2;
    return reinterpret_cast<const float2*>(Rows::piece(rows, row, column / 4))[column % 4 / 2];
  }

  const char* queries_ = nullptr;
};

}  // namespace tokenstep::cuda
