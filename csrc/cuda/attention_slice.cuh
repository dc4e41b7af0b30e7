// The arithmetic of one warp on one slice of 16 tokens: scores of 16 query rows, weighted values. float16 and
// bfloat16 by tensor cores; float32 by fused multiply-adds, with the same values in the same lanes.
//
// The weighted values lie as mma leaves them: outputs[j] are positions 8 * j + 2 * (l % 4) + {0, 1} of row l
// / 4, then of row l / 4 + 8. Which dimension a position is, Fragments knows.
#pragma once
#include "cuda/attention_cache.cuh"
#include "cuda/attention_softmax.cuh"

namespace tokenstep::cuda {

template <int kHeadDim>
using SliceOutputs = float[kHeadDim / 8][4];

template <class T, class C, int kHeadDim>
class SliceMath {
  using Slice = Fragments<T, C, kHeadDim>;
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
      Slice::load_key(keys, step, lane, key);
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
      Slice::load_value(values, step, lane, value);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t half[2] = {value[2 * n], value[2 * n + 1]};
        mma_m16n8k16<T>(outputs[2 * step + n], a, half);
      }
    }
  }

 private:
  __device__ __forceinline__ void load_query(int step, int lane, uint32_t (&query)[4]) const {
    load_matrix_x4(query, SharedRows<T, kHeadDim>::piece(queries_, lane % 16, 2 * step + lane / 16));
  }

  __device__ __forceinline__ static bool all_finite(const char* values) {
    using Rows = typename Slice::Rows;
    bool found = false;
#pragma unroll
    for (int i = 0; i < kSliceTokens * Rows::kPieces / kWarpSize; ++i) {
      const int number = i * kWarpSize + lane_id();
      const uint4 words = *reinterpret_cast<const uint4*>(
          Rows::piece(values, number / Rows::kPieces, number % Rows::kPieces));
      found |= has_non_finite<C>(words.x) || has_non_finite<C>(words.y) || has_non_finite<C>(words.z) ||
               has_non_finite<C>(words.w);
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
      Slice::load_value(values, step, lane, value);
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
template <class C, int kHeadDim>
class SliceMath<float, C, kHeadDim> {
 public:
  __device__ __forceinline__ void load_queries(const char* queries) { queries_ = queries; }

  __device__ __forceinline__ void score(const char* keys, SliceScores& scores) const {
    // Four partial sums: short chains keep the rounding error of sharp weights small.
    float4 sums[2][2][2] = {};
#pragma unroll 2
    for (int quad = 0; quad < kHeadDim / 4; ++quad) {
      float4 query[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) query[r] = load<float>(queries_, lane_id() / 4 + 8 * r, quad);
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 key = load<C>(keys, token_in_slice(n, i), quad);
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
  // kCount neighbours of a row in shared memory, the first a multiple of kCount.
  template <class E, int kCount>
  struct alignas(kCount * sizeof(E)) Neighbours {
    E element[kCount];
  };
  template <class E, int kCount>
  __device__ __forceinline__ static Neighbours<E, kCount> neighbours(const char* rows, int row, int first) {
    using Rows = SharedRows<E, kHeadDim>;
    const char* const piece = Rows::piece(rows, row, first / Rows::kPieceElements);
    return reinterpret_cast<const Neighbours<E, kCount>*>(piece)[first % Rows::kPieceElements / kCount];
  }
  template <class E>
  __device__ __forceinline__ static float4 load(const char* rows, int row, int quad) {
    const auto four = neighbours<E, 4>(rows, row, 4 * quad);
    return {widen(four.element[0]), widen(four.element[1]), widen(four.element[2]), widen(four.element[3])};
  }
  __device__ __forceinline__ static float2 load_pair(const char* rows, int row, int j) {
    const auto two = neighbours<C, 2>(rows, row, 8 * j + lane_id() % 4 * 2);
    return {widen(two.element[0]), widen(two.element[1])};
  }

  const char* queries_ = nullptr;
};

}  // namespace tokenstep::cuda
