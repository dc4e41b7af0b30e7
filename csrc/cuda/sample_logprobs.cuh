// Step 10: log probability and rank of the token, and the top tokens, of the raw or the processed
// distribution.
#pragma once
#include "common/sample_results.h"
#include "cuda/sample_choose.cuh"

namespace tokenstep::cuda {

// What the group's first block found out, in all blocks.
template <class Block>
__device__ __forceinline__ void share_outcome(Block& block, Outcome& outcome) {
  constexpr int kWords = sizeof(Outcome) / sizeof(uint32_t);
  static_assert(kWords <= 8);
  uint32_t words[kWords];
  if (block.group.rank == 0 && block.thread == 0) {
    memcpy(words, &outcome, sizeof outcome);
    for (int i = 0; i < kWords; ++i) block.own_box().mail[block.parity][i] = words[i];
  }
  const uint32_t copy = block.share();
  for (int i = 0; i < kWords; ++i) words[i] = block.read_peer(block.own_box().mail[copy] + i, 0);
  memcpy(&outcome, words, sizeof outcome);
}

// Weight of the raw row, and how many of its tokens come before `token`, of this value.
struct RawTotals {
  uint64_t weight, before;
  uint32_t parity;
};
template <class Block>
__device__ __noinline__ RawTotals weigh_raw(BlockState state, float x_max, float value, int32_t token) {
  using Logit = typename Block::Logit;
  Block block = resume<Block>(state);
  uint64_t before = 0;
  const auto count = [&](const Unit& unit, int at) {
    if (!(max_of_word<Logit>(word_max<Logit>(unit)) >= value)) return;  // most units
    for_each_token<Logit>(
        unit, [&](float x, int place) { before += comes_before(x, block.id_of(at, place), value, token); });
  };
  uint64_t total = weigh<true, false>(block, View{true, false, x_max}, count, [](uint64_t, int) {});
  block.sum_group(total, before);
  return {total, before, block.parity};
}

struct RankFound {
  int32_t rank;
  uint32_t parity;
};
template <class Block>
__device__ __noinline__ RankFound rank_among_left(BlockState state, View view, float value, int32_t token) {
  Block block = resume<Block>(state);
  const uint64_t before = count_before(block, view, value, token);
  return {static_cast<int32_t>(before) + 1, block.parity};
}

// The first tokens of what is left of the view, in order; then, at -inf, others by id.
template <class Block>
__device__ __noinline__ uint32_t write_top_tokens(BlockState state, View view, float log_sum) {
  Block block = resume<Block>(state);
  const SampleParams& p = block.p;
  auto& shared = block.shared;
  const int wanted = num_top_tokens(p, block.row());
  if (block.thread == 0) shared.list_size = shared.num_hits = 0;
  view.last_bin = find_last_bin(block, view, column_max(block, view.raw), wanted);
  collect(block, view);
  Lists lists = share_lists(block, kListSize);
  if (lists.overflow || lists.size > kFewTokens) {
    view.listed = !lists.overflow;
    view.cut =
        find_cut(block, view, Measure{false, view.x_max}, Target::fixed(static_cast<uint64_t>(wanted)));
    if (block.thread == 0) shared.num_hits = 0;
    __syncthreads();
    for_each_left(block, view, [&](float value, int32_t id) {
      const uint32_t place = atomicAdd(&shared.num_hits, 1u);
      if (place < kFewTokens) block.own_box().few[block.parity][place] = {value, id};
    });
    __syncthreads();
    if (block.thread == 0) shared.list_size = shared.num_hits;
    lists = share_lists(block, kFewTokens);
  }
  if (block.group.rank != 0) return block.parity;

  const int count = static_cast<int>(lists.size);
  rank_lists<Block>(suspend(block), view.x_max, count);
  const int64_t first = int64_t{block.index} * p.num_top_logprobs;
  for (int i = block.thread; i < count; i += Block::kThreads) {
    const int rank = shared.few_rank[i];
    if (rank >= wanted) continue;
    p.top_tokens[first + rank] = shared.few[i].id;
    p.top_logprobs[first + rank] =
        log_probability(block.tempered_late(shared.few[i].value), block.tempered_late(view.x_max), log_sum);
  }
  __syncthreads();
  if (block.thread == 0) {
    if (count < wanted) write_banned_top_tokens(p, block.index, count, wanted);
    write_no_top_tokens(p, block.index, wanted);
  }
  return block.parity;
}

template <class Block>
__device__ __forceinline__ void write_logprobs(Block& block, View view, const Plan& plan, Outcome outcome) {
  const SampleParams& p = block.p;
  share_outcome(block, outcome);
  const int32_t token = outcome.token;
  if (token < 0) return;
  float value;
  int32_t rank = outcome.rank;
  if (p.logprobs_mode == LogprobsMode::kRaw) {
    const uint32_t largest = largest_key(block, column_max(block, true));
    view = View{true, false, from_ordered_bits(largest)};
    if constexpr (Block::kPreset) block.scale = 1.0f;  // nothing is tempered from here on
    value = to_float(block.logits[token]);
    const RawTotals totals = weigh_raw<Block>(suspend(block), view.x_max, value, token);
    block.parity = totals.parity;
    outcome.total = totals.weight;
    rank = static_cast<int32_t>(totals.before) + 1;
  } else {
    value = block.value_of(view, token);
    if (plan.greedy) {  // the distribution after step 4
      rank = 1;
      view = View{false, false, view.x_max};
      outcome.total = total_weight(block, view);
    } else {
      view.cut = outcome.cut;
      if (rank == 0) {
        const RankFound found = rank_among_left<Block>(suspend(block), view, value, token);
        block.parity = found.parity;
        rank = found.rank;
      }
    }
  }
  const float log_sum = log_weight_sum(outcome.total);
  if (block.group.rank == 0 && block.thread == 0) {
    p.logprobs[block.index] =
        log_probability(block.tempered_late(value), block.tempered_late(view.x_max), log_sum);
    if (p.ranks) p.ranks[block.index] = rank;
  }
  if (num_top_tokens(p, block.row()) > 0)
    block.parity = write_top_tokens<Block>(suspend(block), view, log_sum);
  else if (block.group.rank == 0 && block.thread == 0)
    write_no_top_tokens(p, block.index, 0);
}

}  // namespace tokenstep::cuda
