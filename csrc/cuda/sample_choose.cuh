// Steps 5-9 of a scanned row: how it is drawn from, what is cut, the token.
#pragma once
#include "cuda/sample_cut.cuh"

namespace tokenstep::cuda {

// What a block must know to go on with a row out of line, and what it must learn from there. Functions that are
// rarely needed, or long, are kept so: inlined, their registers and instructions would burden every row.
struct Resume {
  int index;
  uint32_t parity;
  float scale;
};
template <class Block>
__device__ __forceinline__ Resume suspend(const Block& block) {
  return {block.index, block.parity, block.scale};
}
template <class Block>
__device__ __forceinline__ Block resume(const SampleParams& p, const GroupArgs& args, const Resume& state) {
  Block block(p, args);
  block.locate(state.index);
  block.adopt_params();
  block.scale = state.scale;
  block.parity = state.parity;
  return block;
}

// How a row is drawn from.
struct Plan {
  bool greedy;
  int top_k;    // 0: off
  float top_p;  // 1: off
  uint64_t bits;
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

// ---- out of line
// -------------------------------------------------------------------------------------------------
template <class Block>
__device__ __noinline__ uint64_t total_of_left(const SampleParams& p, const GroupArgs& args, Resume& state,
                                               View view) {
  Block block = resume<Block>(p, args, state);
  uint64_t none = 0, total = weigh<false, false>(block, view, [](const Unit&, int) {}, [](uint64_t, int) {});
  block.sum_group(total, none);
  state.parity = block.parity;
  return total;
}

// Draws from all tokens down to view.cut.value, which is no id's.
template <class Block>
__device__ __noinline__ uint64_t draw_from_all(const SampleParams& p, const GroupArgs& args, Resume& state,
                                               View view, uint64_t bits) {
  Block block = resume<Block>(p, args, state);
  weigh<false, true>(
      block, view, [](const Unit&, int) {},
      [&](uint64_t sum, int place) { add_to_bin(block, place / kTokensPerBin, sum); });
  const Crossing crossing =
      find_crossing(block, true, [&](uint64_t total) { return draw_target(bits, total) + 1; });
  if (block.group.rank == 0) find_token(block, view, crossing);
  state.parity = block.parity;
  return crossing.total;
}

// Cuts, and draws if the kernel does. `total` is the weight that top-p refers to, 0: of the k first.
struct Wide {
  Cut cut;
  uint64_t total;
};
template <class Block, bool kDraws>
__device__ __noinline__ Wide choose_from_many(const SampleParams& p, const GroupArgs& args, Resume& state,
                                              View view, int top_k, float top_p, uint64_t total, uint64_t bits) {
  Block block = resume<Block>(p, args, state);
#pragma unroll 1
  for (int step = top_k > 0 ? 7 : 8; step <= (top_p < 1.0f ? 8 : 7); ++step)
    view.cut = find_cut(block, view, Measure{step == 8, view.x_max}, [&](uint64_t all) {
      return step == 8 ? top_p_target(top_p, total ? total : all) : static_cast<uint64_t>(top_k);
    });
  Wide result = {view.cut, 0};
  if constexpr (kDraws) result.total = draw_left(block, view, bits);
  state.parity = block.parity;
  return result;
}

// ---- the row
// -----------------------------------------------------------------------------------------------------
// Step 5. False if nothing is left.
template <class Block>
__device__ __forceinline__ bool make_plan(Block& block, float edited_max, Plan& plan, View& view) {
  const RowParams& row = block.row();
  plan.greedy = is_greedy(row.temperature, edited_max);
  block.scale = plan.greedy ? 1.0f : inverse_temperature(row.temperature);
  view.x_max = apply_temperature(edited_max, block.scale);
  if (!(view.x_max > -kInfinity)) return false;
  plan.top_k = plan.greedy ? 1 : effective_top_k(row, block.p.vocab_size);
  plan.top_p = plan.greedy ? 1.0f : row.top_p;
  plan.bits = random_bits(row.seed, row.position, row.substream);
  if (!plan.greedy) view.cut.value = fmaxf(view.cut.value, min_p_threshold(view.x_max, row.min_p));
  return true;
}

// Steps 6-9 where the list of the group's first block holds all: few tokens.
template <class Block, bool kDraws>
__device__ __forceinline__ void choose_from_few(Block& block, const View& view, const Plan& plan, int count,
                                                uint64_t total, Outcome& outcome) {
  gather(block);
  rank_few(block, view, count);
  const int left = cut_few(block, count, plan.top_k, plan.top_p, total);
  find_cut_of_few(block, count, left);
  if constexpr (kDraws) outcome.total = draw_few(block, count, left, plan.bits);
  __syncthreads();
  outcome.cut = block.shared.found_cut;
  if constexpr (kDraws) {
    outcome.token = block.shared.found_token;
    outcome.rank = block.shared.found_rank;
  }
}

// The token that find_token() found; its rank is not known.
template <class Block>
__device__ __forceinline__ void take_found_token(Block& block, Outcome& outcome) {
  __syncthreads();
  if (block.group.rank == 0) outcome.token = block.shared.found_token;
  outcome.rank = 0;
}

// Steps 6-9. The outcome is that of the group's first block; its cut is all blocks', if `cut_is_known`.
template <class Block, bool kDraws>
__device__ __forceinline__ Outcome choose(Block& block, View& view, const Plan& plan, const ThreadScan& scan,
                                          const ColumnMaxima& maxima, bool& cut_is_known) {
  Outcome outcome;
  outcome.cut = view.cut;
  cut_is_known = true;
  const bool has_top_p = plan.top_p < 1.0f, has_min_p = view.cut.value > View{}.cut.value;
  if (plan.top_k == 0 && !has_top_p && (!has_min_p || !kDraws)) {  // all tokens, or all above a threshold
    if constexpr (kDraws) {
      Resume state = suspend(block);
      outcome.total = draw_from_all<Block>(block.p, block.args, state, view, plan.bits);
      block.parity = state.parity;
      take_found_token(block, outcome);
    }
    return outcome;
  }
  uint64_t total = 0;  // that top-p refers to, where it is not that of the k first
  if (plan.top_k == 0 && has_top_p) {
    Resume state = suspend(block);
    total = total_of_left<Block>(block.p, block.args, state, view);
    block.parity = state.parity;
  }
  const bool by_maxima = plan.top_k > 0 && plan.top_k <= most_by_maxima(block);
  view.last_bin = find_last_bin(block, view, maxima, by_maxima ? plan.top_k : open_count(block));
  collect(block, view, scan);

  uint64_t own_weight = 0, none = 0;
  if (total > 0) {
    __syncthreads();
    const int size = min(static_cast<int>(block.shared.list_size), kListSize);
#pragma unroll 1
    for (int i = block.thread; i < size; i += Block::kThreads)
      own_weight += weight(distance_from_max(block.shared.list[i].value, view.x_max));
    block.sum_block(own_weight, none);
  }
  const Lists lists = share_lists(block, kListSize, own_weight);
  // Can no token beyond the lists be left?
  const bool complete = by_maxima || view.last_bin == kBins - 1 || bin_of(view, view.cut.value) <= view.last_bin ||
                        (total > 0 && lists.weight >= top_p_target(plan.top_p, total));
  view.listed = complete && !lists.overflow;
  if (view.listed && lists.size <= kFewTokens) {
    cut_is_known = false;
    if (block.group.rank == 0)
      choose_from_few<Block, kDraws>(block, view, plan, static_cast<int>(lists.size), total, outcome);
    return outcome;
  }
  Resume state = suspend(block);
  const Wide wide = choose_from_many<Block, kDraws>(block.p, block.args, state, view, plan.top_k, plan.top_p, total,
                                                    plan.bits);
  block.parity = state.parity;
  outcome.cut = wide.cut;
  outcome.total = wide.total;
  if constexpr (kDraws) take_found_token(block, outcome);
  return outcome;
}

}  // namespace tokenstep::cuda
