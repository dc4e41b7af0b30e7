// The pass that weighs every token of the view: what log probabilities need, and draws and nuclei that no
// list holds. About 17 instructions a token; sums are integers, so that nothing depends on who adds what.
#pragma once
#include "cuda/sample_scan.cuh"

namespace tokenstep::cuda {

// Weights below 2^28 add up in 32 bits over a unit of 8 tokens: those of values this far below the maximum,
// with 2^-0.9 to spare for the polynomial.
constexpr float kNarrowDistance = -9.0f;

// Sum over the lanes of values below 2^44.
__device__ __forceinline__ uint64_t warp_sum_44(uint64_t value) {
  constexpr int kLowBits = 22;
  const uint32_t low = static_cast<uint32_t>(value) & ((1u << kLowBits) - 1);
  const uint32_t high = static_cast<uint32_t>(value >> kLowBits);
  return __reduce_add_sync(kAllLanes, low) + (uint64_t{__reduce_add_sync(kAllLanes, high)} << kLowBits);
}

// Weight of the tokens of one unit that `tokens` names and that are at least `least`.
template <class Block, bool kRaw>
__device__ __forceinline__ uint64_t weigh_unit(const Block& block, const Unit& unit, uint32_t tokens,
                                               float x_max, float least) {
  using Logit = typename Block::Logit;
  const auto weights = [&](auto add) {
#pragma unroll
    for (int w = 0; w < kUnitWords; ++w)
#pragma unroll
      for (int i = 0; i < kWordTokens<Logit>; ++i) {
        const float x = token_of_word<Logit>(unit.word[w], i);
        const float value = kRaw ? x : block.tempered(x);
        float as_float = weight_as_float(sub(kRaw ? value : block.tempered_late(value), x_max));
        if constexpr (!kRaw)  // without a branch
          as_float = (tokens >> (w * kWordTokens<Logit> + i) & 1) && value >= least ? as_float : 0.0f;
        add(as_float);
      }
  };
  const float unit_max = max_of_word<Logit>(word_max<Logit>(unit));
  if (sub(kRaw ? unit_max : block.tempered_late(block.tempered(unit_max)), x_max) < kNarrowDistance) {
    uint32_t sum = 0;
    weights([&](float weight) { sum += static_cast<uint32_t>(weight); });
    return sum;
  }
  uint64_t sum = 0;
  weights([&](float weight) { sum += static_cast<uint64_t>(static_cast<int64_t>(weight)); });
  return sum;
}

// Weight of all that is left of the view, of this thread's part of the row: each sum over 32 units and each
// edit's weight goes to add(sum, place) once (`kByPlace`, by one thread of the warp), or all is returned.
template <bool kRaw, bool kByPlace, class Block, class Visit, class Add>
__device__ __forceinline__ uint64_t weigh(Block& block, const View& view, Visit visit, Add add) {
  const float x_max = kRaw ? view.x_max : block.tempered_late(view.x_max), least = view.cut.value;
  uint64_t total = 0;
#pragma unroll 1
  for (int base = block.first_unit + block.warp * kWarpSize; base < block.end_unit; base += Block::kThreads) {
    const int at = base + block.lane;
    uint64_t sum = 0;
    if (at < block.end_unit) {
      const Unit unit = block.load(at);
      sum = weigh_unit<Block, kRaw>(block, unit, kRaw ? 0 : block.live_tokens(at), x_max, least);
      visit(unit, at);
    }
    if constexpr (kByPlace) {
      sum = warp_sum_44(sum);
      if (block.lane == 0 && sum) add(sum, base * Block::kUnit);
    } else {
      total += sum;
    }
  }
  if constexpr (!kRaw)
    block.for_each_edit(block.first_edit(), [&](int32_t id, float value) {
      value = block.value_in(view, value);
      if (!(value >= least)) return;
      const uint64_t sum = block.weight_of(value, x_max);
      if constexpr (kByPlace)
        add(sum, id + block.shift);
      else
        total += sum;
    });
  return total;
}

}  // namespace tokenstep::cuda
