// Where the top-p cut may lie, before tokens are sorted out: a sure bound for peaked rows, a guess for flat
// ones.
#pragma once
#include "cpu/sample_row.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

// Every block holds a token at its maximum. If the maxima alone reach the target, then so do the tokens that
// are at least as large as the smallest maximum needed: `least`. False if they do not reach it.
inline bool bound_of_nucleus(const float* maxima, int num_blocks, float scale, float x_max, uint64_t target,
                             RowScratch& scratch, float& least) {
  int32_t* keys = scratch.keys.reserve(static_cast<size_t>(num_blocks));
  uint64_t* weights = scratch.above.reserve(static_cast<size_t>(num_blocks));
  uint64_t sum = 0;
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int b = 0; b < num_blocks; ++b) {
    const float value = mul(maxima[b], scale);
    weights[b] = static_cast<uint64_t>(static_cast<int64_t>(weight_as_float(sub(value, x_max))));
    sum += weights[b];
    keys[b] = ordered_int(static_cast<int32_t>(bits_of(value)));
    low = keys[b] < low ? keys[b] : low;
    high = keys[b] > high ? keys[b] : high;
  }
  if (sum < target) return false;
  int reached_by = num_blocks, not_reached_by = 0;  // how many maxima are >= low, > high
  while (low < high && reached_by - not_reached_by > 4) {
    const int32_t middle = static_cast<int32_t>(high - (int64_t{high} - low) / 2);
    uint64_t reached = 0;
    int count = 0;
    for (int b = 0; b < num_blocks; ++b) {
      reached += weights[b] & -static_cast<uint64_t>(keys[b] >= middle);
      count += keys[b] >= middle;
    }
    if (reached >= target) {
      low = middle;
      reached_by = count;
    } else {
      high = middle - 1;
      not_reached_by = count;
    }
  }
  least = float_from_bits(static_cast<uint32_t>(ordered_int(low)));
  return true;
}

// Values between which the cut is expected.
struct Bracket {
  float least, most;
};

// The cut of a wide nucleus, guessed from its tail: two tokens per block, plus the block maxima. The
// positions are fixed, so that the guess, like everything else, depends on the row alone.
template <class Logit>
Bracket guess_bracket(const Row<Logit>& row, float scale, float x_max, float threshold, float top_p,
                      uint64_t total) {
  constexpr int kBins = 256;
  constexpr double kTokensPerSample = kBlock / 2.0;
  const int num_blocks = row.num_blocks;
  float* x = row.scratch.samples.reserve(3 * static_cast<size_t>(num_blocks));
  float* w = row.scratch.sample_weights.reserve(3 * static_cast<size_t>(num_blocks));
  int count = 0;
  for (int b = 0; b < num_blocks; ++b) {
    const float top = mul(row.edited_max()[b], scale);
    for (int k = 0; k < 2; ++k) {
      const int32_t id = std::min(b * kBlock + ((b * 37 + k * 131) & (kBlock - 1)), row.vocab_size - 1);
      const float value = mul(row.edited_value(id), scale);
      x[count] = value;  // block maxima are counted on their own
      count += static_cast<int>(value < top) & static_cast<int>(value >= threshold) &
               static_cast<int>(value > x_max - 60.0f);
    }
  }
  float least = kInfinity, most = -kInfinity;
  for (int i = 0; i < count; ++i) {
    least = std::min(least, x[i]);
    most = std::max(most, x[i]);
  }
  if (!(most > least)) return {threshold, kInfinity};
  const int num_samples = count;
  for (int b = 0; b < num_blocks; ++b) x[count++] = mul(row.edited_max()[b], scale);
  for (int i = 0; i < count; ++i) w[i] = weight_of(x[i], 1.0f, x_max);

  const float bins_per_unit = kBins / std::max(most - least, 1e-30f);
  const auto bin_of = [&](float value) {
    return std::clamp(static_cast<int>((value - least) * bins_per_unit), 0, kBins - 1);
  };
  double weight_in_bin[kBins] = {};
  int samples_in_bin[kBins] = {};
  for (int i = 0; i < num_samples; ++i) {
    weight_in_bin[bin_of(x[i])] += kTokensPerSample * static_cast<double>(w[i]);
    ++samples_in_bin[bin_of(x[i])];
  }
  for (int i = num_samples; i < count; ++i)
    if (x[i] <= most && x[i] >= least) weight_in_bin[bin_of(x[i])] += static_cast<double>(w[i]);

  const double budget =
      (1.0 - static_cast<double>(top_p)) * static_cast<double>(total);  // what the cut takes off
  int lower = -1, upper = kBins;
  double tail = 0;
  for (int i = 0; i < kBins; ++i) {
    tail += weight_in_bin[i];
    if (tail <= 0.65 * budget) lower = i;
    if (tail >= 1.5 * budget) {
      upper = i;
      break;
    }
  }
  Bracket bracket{threshold, kInfinity};
  int seen = 0;  // candidates are cheap: a bracket may hold three samples' worth, and has no upper end unless
                 // that spares many
  for (int i = kBins - 1; i >= 0; --i) {
    if (i == upper && seen >= 16) bracket.most = least + static_cast<float>(i + 1) / bins_per_unit;
    seen += samples_in_bin[i];
    if (i <= lower && seen >= 3) {
      bracket.least = std::max(threshold, least + static_cast<float>(i) / bins_per_unit);
      break;
    }
  }
  return bracket;
}

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
