// Bounds of block sums: the few blocks that hold nearly all of the weight are weighed exactly, the others are
// bounded by the scan's estimates. Mostly that settles the token, and no pass over the vocabulary is needed;
// where it does not, the caller weighs everything. Either way the token is that of the exact sums.
#pragma once
#include <cmath>

#include "cpu/sample_row.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

struct BlockBounds {
  const uint64_t* least;  // per block; both are the sum itself where it was weighed
  const uint64_t* most;
  uint64_t total_least, total_most;
};

// The least estimate of a block to be weighed, such that all blocks below hold at most `light_share` of the
// row.
inline float least_heavy_estimate(const float* estimates, int num_blocks, double light_share) {
  float largest = 0.0f, total = 0.0f;
  for (int b = 0; b < num_blocks; ++b) {
    largest = std::max(largest, estimates[b]);
    total += estimates[b];
  }
  const float limit = static_cast<float>(light_share) * total;
  float threshold = largest;
  for (int halvings = 0; halvings < 64; ++halvings, threshold *= 0.5f) {
    float lane[kLanes] = {}, light = 0.0f;
    int b = 0;
    for (; b + kLanes <= num_blocks; b += kLanes)
      for (int j = 0; j < kLanes; ++j) lane[j] += estimates[b + j] < threshold ? estimates[b + j] : 0.0f;
    for (; b < num_blocks; ++b) light += estimates[b] < threshold ? estimates[b] : 0.0f;
    for (const float part : lane) light += part;
    if (light <= limit) return threshold;
  }
  return 0.0f;
}

// False if the estimates say too little: out of range, or so even that most blocks would have to be weighed.
template <class Logit>
bool bound_blocks(const Row<Logit>& row, float scale, float x_max, double light_share, BlockBounds& bounds) {
  const float* estimates = row.estimates();
  const int num_blocks = row.num_blocks;
  const float log2_max = x_max * kLog2E;
  if (!estimates || !(log2_max >= kEstimateLeast && log2_max <= kEstimateMost)) return false;
  const float threshold = least_heavy_estimate(estimates, num_blocks, light_share);
  int num_heavy = 0;
  for (int b = 0; b < num_blocks; ++b) num_heavy += estimates[b] >= threshold;
  if (num_heavy > num_blocks / 2) return false;

  // From the unit of the estimates, exp(0), to that of the weights, 2^-40 exp(x_max).
  const double unit = std::exp2(kWeightBits - static_cast<double>(x_max) * 1.4426950408889634);
  const double to_most = unit * (1.0 + kEstimateSlack),
               to_least = unit * (1.0 - kEstimateSlack) / kEstimateExcess;
  uint64_t* least = row.scratch.sum.reserve(static_cast<size_t>(num_blocks));
  uint64_t* most = row.scratch.most.reserve(static_cast<size_t>(num_blocks));
  bounds = {least, most, 0, 0};
  for (int b = 0; b < num_blocks; ++b) {
    if (estimates[b] >= threshold) {
      alignas(64) float buffer[kBlock];
      const float top = apply_temperature(row.edited_max()[b], scale);
      least[b] = most[b] = sum_of_weights(row.edited_block(b, buffer), scale, x_max,
                                          mul(sub(top, x_max), kLog2E), row.address_of_block(b));
    } else {
      const double estimate = static_cast<double>(estimates[b]);
      most[b] = static_cast<uint64_t>(static_cast<int64_t>(estimate * to_most)) + 1;
      const int64_t truncated =
          static_cast<int64_t>(estimate * to_least) - kBlock;  // each weight lost less than 1
      least[b] = truncated > 0 ? static_cast<uint64_t>(truncated) : 0;
    }
    bounds.total_least += least[b];
    bounds.total_most += most[b];
  }
  return true;
}

// Step 9 over all tokens, for any sums within the bounds: the token, or -1 if they leave a choice.
template <class Logit>
int32_t draw_within(const BlockBounds& bounds, const Row<Logit>& row, float scale, float x_max,
                    uint64_t bits) {
  const uint64_t target_least = draw_target(bits, bounds.total_least),
                 target_most = draw_target(bits, bounds.total_most);
  uint64_t before_least = 0, before_most = 0;
  int block = 0;
  while (before_most + bounds.most[block] <=
         target_least) {  // surely before the token: the totals end the loop
    before_least += bounds.least[block];
    before_most += bounds.most[block++];
  }
  if (bounds.least[block] != bounds.most[block]) return -1;
  alignas(64) float buffer[kBlock];
  alignas(64) uint64_t weights[kBlock];
  weights_of_block(row.edited_block(block, buffer), scale, x_max, weights);
  uint64_t sum = 0;
  for (int i = 0; i < kBlock; ++i) {
    if (before_least + sum + weights[i] > target_most)
      return before_most + sum <= target_least ? block * kBlock + i : -1;
    sum += weights[i];
  }
  return -1;
}

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
