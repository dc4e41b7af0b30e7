// Steps 5-9 of a scanned row: how it is drawn from, what is cut, the token.
#pragma once
#include "cuda/sample_cut.cuh"

namespace tokenstep::cuda {

// How a row is drawn from.
struct Plan {
  bool draws;  // false: the cut is enough
  bool greedy;
  int top_k;    // 0: off
  float top_p;  // 1: off
  uint64_t bits;
  bool keeps_ties;       // at the k-th value
  float last_threshold;  // min-p's, where it comes behind top-p
};

// A threshold serves so many tokens: beyond, the maxima of the threads say too little.
template <class Block>
__device__ __forceinline__ int most_by_maxima(const Block& block) {
  return block.group.size * Block::kThreads / 4 * 3;
}
// Tokens to collect where no top-k says how many: few nuclei are wider.
template <class Block>
__device__ __forceinline__ int open_count(const Block& block) {
  return min(block.group.size * Block::kThreads / 2, 512);
}

// ---- out of line ----------------------------------------------------------------------------------------
struct Weighed {
  uint64_t weight;
  uint32_t parity;
};

template <class Block>
__device__ __noinline__ Weighed weigh_left(BlockState state, View view) {
  Block block = resume<Block>(state);
  uint64_t none = 0, total = weigh<false, false>(block, view, [](const Unit&, int) {}, [](uint64_t, int) {});
  block.sum_group(total, none);
  return {total, block.parity};
}
// Weight of all tokens down to view.cut.value, which is no id's.
template <class Block>
__device__ __forceinline__ uint64_t total_weight(Block& block, const View& view) {
  const Weighed weighed = weigh_left<Block>(suspend(block), view);
  block.parity = weighed.parity;
  return weighed.weight;
}

// Weight of what this block has listed.
template <class Block>
__device__ __noinline__ uint64_t weight_of_list(BlockState state, float x_max) {
  Block block = resume<Block>(state);
  __syncthreads();
  const int size = min(static_cast<int>(block.shared.list_size), kListSize);
  uint64_t weights = 0, none = 0;
#pragma unroll 1
  for (int i = block.thread; i < size; i += Block::kThreads)
    weights += weight(distance_from_max(block.shared.list[i].value, x_max));
  block.sum_block(weights, none);
  return weights;
}

// Draws from all of them, for shared.found_token of the group's first block; returns their weight.
template <class Block>
__device__ __noinline__ Weighed draw_from_all(BlockState state, View view, uint64_t bits) {
  Block block = resume<Block>(state);
  weigh<false, true>(
      block, view, [](const Unit&, int) {},
      [&](uint64_t sum, int place) { add_to_bin(block, bin_of_place(place), sum); });
  const Crossing crossing = find_crossing(block, true, Target::random(bits));
  if (block.group.rank == 0) find_token(block, view, crossing);
  return {crossing.total, block.parity};
}

// Draws from what is left of the view, likewise.
template <class Block>
__device__ __noinline__ Weighed draw_from_left(BlockState state, View view, uint64_t bits) {
  Block block = resume<Block>(state);
  const uint64_t total = draw_left(block, view, bits);
  return {total, block.parity};
}

// ---- the row --------------------------------------------------------------------------------------------
// Step 5. False if nothing is left.
template <class Block>
__device__ __forceinline__ bool make_plan(Block& block, float edited_max, bool draws, Plan& plan,
                                          View& view) {
  const RowParams& row = block.row();
  const Rules rules = block.rules();
  plan.draws = draws;
  plan.greedy = is_greedy(row.temperature, edited_max, rules);
  const float scale = rules.divides ? row.temperature : inverse_temperature(row.temperature);
  block.scale = plan.greedy ? 1.0f : scale;
  view.x_max = block.tempered(edited_max);
  if (!(block.tempered_late(view.x_max) > -kInfinity)) return false;
  if (rules.tempers_last) block.scale = 1.0f;
  plan.top_k = plan.greedy ? 1 : effective_top_k(row, block.p.vocab_size);
  plan.top_p = plan.greedy ? 1.0f : row.top_p;
  plan.bits = random_bits(row.seed, row.position, row.substream);
  plan.keeps_ties = rules.keeps_ties && !plan.greedy;
  plan.last_threshold = -kInfinity;
  if (plan.greedy) return true;
  const float threshold = min_p_threshold(view.x_max, row.min_p);
  if (rules.min_p_last && plan.top_p < 1.0f)
    plan.last_threshold = threshold;
  else
    view.cut.value = fmaxf(view.cut.value, threshold);
  return true;
}

// The cuts are made: where step 5 comes last, weights are tempered from here on.
template <class Block>
__device__ __forceinline__ void temper_weights(Block& block, const Plan& plan) {
  if (block.rules().tempers_last && !plan.greedy) block.scale = block.row().temperature;
}

// Steps 6-9 where the list of the group's first block holds all: few tokens.
template <class Block>
__device__ __forceinline__ void choose_from_few(Block& block, const View& view, const Plan& plan, int count,
                                                uint64_t total, Outcome& outcome) {
  rank_lists<Block>(suspend(block), view.x_max, count);
  int left = cut_few(block, count, plan.top_k, plan.keeps_ties, plan.top_p, total);
  if constexpr (Block::kPreset) {
    left = min(left, count_few_from(block, count, plan.last_threshold));
    temper_weights(block, plan);
    if (block.rules().tempers_last) weigh_few(block, count, view.x_max);
  }
  find_cut_of_few(block, count, left);
  if (plan.draws) outcome.total = draw_few(block, count, left, plan.bits);
  __syncthreads();
  outcome.cut = block.shared.found_cut;
  if (plan.draws) {
    outcome.token = block.shared.found_token;
    outcome.rank = block.shared.found_rank;
  }
}

// The token that find_token() found; its rank is not known.
template <class Block>
__device__ __forceinline__ void take_drawn(Block& block, const Weighed& drawn, Outcome& outcome) {
  block.parity = drawn.parity;
  __syncthreads();
  if (block.group.rank == 0) outcome.token = block.shared.found_token;
  outcome.rank = 0;
  outcome.total = drawn.weight;
}

// Steps 6-9. The outcome is that of the group's first block; its cut is all blocks', if `cut_is_known`.
template <class Block>
__device__ __forceinline__ Outcome choose(Block& block, View& view, const Plan& plan, uint32_t own_column_max,
                                          bool& cut_is_known) {
  Outcome outcome;
  outcome.cut = view.cut;
  cut_is_known = true;
  const bool has_top_p = plan.top_p<1.0f, has_min_p = view.cut.value> View{}.cut.value;
  if (plan.top_k == 0 && !has_top_p && (!has_min_p || !plan.draws)) {  // all tokens, or all above a threshold
    temper_weights(block, plan);
    if (plan.draws) take_drawn(block, draw_from_all<Block>(suspend(block), view, plan.bits), outcome);
    return outcome;
  }
  uint64_t total = 0;  // that top-p refers to, where it is not that of the k first
  if (plan.top_k == 0 && has_top_p) total = total_weight(block, view);
  const bool by_maxima = plan.top_k > 0 && plan.top_k <= most_by_maxima(block);
  view.last_bin = find_last_bin(block, view, own_column_max, by_maxima ? plan.top_k : open_count(block));
  collect(block, view);

  const Lists lists = share_lists(block, kListSize, total > 0,
                                  total > 0 ? weight_of_list<Block>(suspend(block), view.x_max) : 0);
  // Can no token beyond the lists be left?
  const bool complete = by_maxima || view.last_bin == kBins - 1 ||
                        bin_of(view, view.cut.value) <= view.last_bin ||
                        (total > 0 && lists.weight >= top_p_target(plan.top_p, total));
  view.listed = complete && !lists.overflow;
  if (view.listed && lists.size <= kFewTokens) {
    cut_is_known = false;
    if (block.group.rank == 0)
      choose_from_few(block, view, plan, static_cast<int>(lists.size), total, outcome);
    temper_weights(block, plan);
    return outcome;
  }
  if (plan.top_k > 0)
    view.cut =
        find_cut(block, view, Measure{false, view.x_max}, Target::fixed(static_cast<uint64_t>(plan.top_k)));
  if (plan.keeps_ties && plan.top_k > 0) view.cut.id = INT32_MAX;
  if (has_top_p)
    view.cut = find_cut(block, view, Measure{true, view.x_max}, Target::share(plan.top_p, total));
  if constexpr (Block::kPreset) view.cut = with_threshold(view.cut, plan.last_threshold);
  temper_weights(block, plan);
  outcome.cut = view.cut;
  if (!plan.draws) return outcome;
  const bool all_above = !view.listed && view.cut.id == INT32_MAX;
  take_drawn(block,
             all_above ? draw_from_all<Block>(suspend(block), view, plan.bits)
                       : draw_from_left<Block>(suspend(block), view, plan.bits),
             outcome);
  return outcome;
}

}  // namespace tokenstep::cuda
