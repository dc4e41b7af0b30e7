// Online softmax (Milakov and Gimelshein, arXiv 1805.02867) in powers of two: what makes weights of raw
// scores, and how partial results of a row are merged.
//
// Scores lie as mma leaves them: a lane has two rows, l / 4 and l / 4 + 8 of the tile, and of each slice the
// tokens 8 * n + 2 * (l % 4) + i, n and i of {0, 1}. The four lanes of a row agree on its maximum.
#pragma once
#include "cuda/attention_rows.cuh"

namespace tokenstep::cuda {

constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309;

// What weights are relative to: no maximum (-inf) is as good as 0.
__device__ __forceinline__ float reference_of(float max) { return max == kMinusInfinity ? 0.0f : max; }

__device__ __forceinline__ int token_in_slice(int n, int i) { return n * 8 + lane_id() % 4 * 2 + i; }

// The scores of one slice: [row of the lane][n][i].
struct SliceScores {
  float of[2][2][2];
};

// What raw scores of a lane's two rows go through, in this order: scale, softcap, ALiBi, mask. log2(e) is
// folded into the constants.
class ScoreRules {
 public:
  // `key_scale`: of the KV head's keys, 1 unless they are quantised.
  __device__ __forceinline__ ScoreRules(const TileRows& rows, float key_scale)
      : rows_(rows), op_(rows.params.op) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = lane_id() / 4 + 8 * r;
      const bool exists = row < rows.count;
      position_[r] = exists ? rows.position_of(row) : -1;  // sees nothing
      slope_[r] = exists && op_.alibi_slopes ? op_.alibi_slopes[rows.head_of_row(row)] * kLog2E : 0.0f;
    }
    const bool has_softcap = op_.softcap > 0.0f;
    factor_ = has_softcap ? op_.scale / op_.softcap : op_.scale * kLog2E;
    factor_ *= key_scale;
  }

  __device__ __forceinline__ int position(int r) const { return position_[r]; }
  __device__ __forceinline__ bool sees(int r, int token) const {
    return token <= position_[r] && token >= static_cast<int>(first_key(position_[r], op_.window));
  }

  __device__ __forceinline__ void apply(int slice, bool all_see_all, SliceScores& scores) const {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& s = scores.of[r][n][i];
          s *= factor_;
          if (op_.softcap > 0.0f) s = tanhf(s) * (op_.softcap * kLog2E);
          const int token = slice + token_in_slice(n, i);
          if (op_.alibi_slopes) s = __fmaf_rn(slope_[r], static_cast<float>(token - position_[r]), s);
          if (!all_see_all && !sees(r, token)) s = kMinusInfinity;
        }
  }

 private:
  const TileRows& rows_;
  const AttentionParams& op_;
  int position_[2];
  float slope_[2], factor_;
};

// Running maximum and sum of a lane's two rows; the sum is of this lane's tokens.
struct RunningRows {
  float max[2] = {kMinusInfinity, kMinusInfinity}, sum[2] = {0.0f, 0.0f};

  // Scores become weights; `alpha` is what older weights must be multiplied with. A slice of which a row sees
  // nothing changes none of its bits.
  __device__ __forceinline__ void add(SliceScores& scores, float (&alpha)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = max[r];
#pragma unroll
      for (int n = 0; n < 2; ++n) top = fmaxf(top, fmaxf(scores.of[r][n][0], scores.of[r][n][1]));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float reference = reference_of(top);
      alpha[r] = exp2_approx(max[r] - reference);
      max[r] = top;
      sum[r] *= alpha[r];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          scores.of[r][n][i] = exp2_approx(scores.of[r][n][i] - reference);
          sum[r] += scores.of[r][n][i];
        }
    }
  }
  // The four lanes of a row get its whole sum.
  __device__ __forceinline__ void join_lanes() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 1);
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 2);
    }
  }
};

// ---- a row's total, and one more part ---------------------------------------------------------------------
struct RowTotal {
  float max = kMinusInfinity, sum = 0.0f;

  // What outputs of the total, and of the part, are to be multiplied with. An empty part (-inf, 0) gives 1
  // and 0.
  __device__ __forceinline__ void add(float part_max, float part_sum, float& keep, float& take) {
    const float top = fmaxf(max, part_max), reference = reference_of(top);
    keep = exp2_approx(max - reference);
    take = exp2_approx(part_max - reference);
    sum = __fmaf_rn(part_sum, take, sum * keep);
    max = top;
  }
  // A sink is one more score, without a value; returns what outputs are to be multiplied with.
  __device__ __forceinline__ float add_sink(float sink) {
    const float score = sink * kLog2E;
    if (score == kMinusInfinity) return 1.0f;
    float keep, take;
    add(score, 1.0f, keep, take);
    return keep;
  }
  __device__ __forceinline__ float log_sum_exp() const {
    if (sum == 0.0f) return kMinusInfinity;
    return static_cast<float>(max * kLn2 + static_cast<double>(logf(sum)));
  }
};

}  // namespace tokenstep::cuda
