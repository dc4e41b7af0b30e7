// Step 10: log probability and rank of the token, and the top tokens, of the raw or the processed distribution.
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
  for (int i = 0; i < kWords; ++i) words[i] = block.group.read(&block.box(0).mail[copy][i]);
  memcpy(&outcome, words, sizeof outcome);
}

// Weight of the raw row, and how many of its tokens come before `token`, of this value.
struct RawTotals {
  uint64_t weight, before;
};
template <class Block>
__device__ __noinline__ RawTotals raw_totals(const SampleParams& p, const GroupArgs& args, Resume& state, float x_max,
                                             float value, int32_t token) {
  using Logit = typename Block::Logit;
  Block block = resume<Block>(p, args, state);
  uint64_t before = 0;
  const auto count = [&](const Unit& unit, int at) {
    if (!(max_of_word<Logit>(word_max<Logit>(unit)) >= value)) return;  // most units
    for_each_token<Logit>(
        unit, [&](float x, int place) { before += comes_before(x, block.id_of(at, place), value, token); });
  };
  uint64_t total = weigh<true, false>(block, View{true, false, x_max}, count, [](uint64_t, int) {});
  block.sum_group(total, before);
  state.parity = block.parity;
  return {total, before};
}

template <class Block>
__device__ __noinline__ int32_t rank_among_left(const SampleParams& p, const GroupArgs& args, Resume& state, View view,
                                                float value, int32_t token) {
  Block block = resume<Block>(p, args, state);
  const uint64_t before = count_before(block, view, value, token);
  state.parity = block.parity;
  return static_cast<int32_t>(before) + 1;
}

// The first tokens of what is left of the view, in order; then, at -inf, others by id.
template <class Block>
__device__ __noinline__ void write_top_tokens(const SampleParams& p, const GroupArgs& args, Resume& state, View view,
                                              ThreadScan scan, float log_sum) {
  Block block = resume<Block>(p, args, state);
  auto& shared = block.shared;
  const int wanted = num_top_tokens(p, block.row());
  __syncthreads();
  if (block.thread == 0) shared.list_size = shared.num_hits = 0;
  const ColumnMaxima maxima = read_maxima(block, view.raw);
  view.last_bin = find_last_bin(block, view, maxima, wanted);
  collect(block, view, scan);
  Lists lists = share_lists(block, kListSize, 0);
  if (lists.overflow || lists.size > kFewTokens) {
    view.listed = !lists.overflow;
    view.cut = find_cut(block, view, Measure{false, view.x_max},
                        [&](uint64_t) { return static_cast<uint64_t>(wanted); });
    __syncthreads();
    if (block.thread == 0) shared.num_hits = 0;
    __syncthreads();
    for_each_left(block, view, [&](float value, int32_t id) {
      const uint32_t place = atomicAdd(&shared.num_hits, 1u);
      if (place < kFewTokens) block.own_box().few[block.parity][place] = {value, id};
    });
    __syncthreads();
    if (block.thread == 0) shared.list_size = shared.num_hits;
    lists = share_lists(block, kFewTokens, 0);
  }
  state.parity = block.parity;
  if (block.group.rank != 0) return;

  const int count = static_cast<int>(lists.size);
  gather(block);
  rank_few(block, view, count);
  const int64_t first = int64_t{block.index} * p.num_top_logprobs;
  for (int i = block.thread; i < count; i += Block::kThreads) {
    const int rank = shared.few_rank[i];
    if (rank >= wanted) continue;
    p.top_tokens[first + rank] = shared.few[i].id;
    p.top_logprobs[first + rank] = log_probability(shared.few[i].value, view.x_max, log_sum);
  }
  __syncthreads();
  if (block.thread != 0) return;
  if (count < wanted) write_banned_top_tokens(p, block.index, count, wanted);
  write_no_top_tokens(p, block.index, wanted);
}

template <class Block>
__device__ __forceinline__ void write_logprobs(Block& block, View view, const Plan& plan, const ThreadScan& scan,
                                               Outcome outcome) {
  const SampleParams& p = block.p;
  Resume state = suspend(block);
  share_outcome(block, outcome);
  state.parity = block.parity;
  const int32_t token = outcome.token;
  float value;
  int32_t rank = outcome.rank;
  if (p.logprobs_mode == LogprobsMode::kRaw) {
    const uint32_t largest = largest_key(block, read_maxima(block, true));
    view = View{true, false, from_ordered_bits(largest)};
    value = block.raw_value(token);
    const RawTotals totals = raw_totals<Block>(p, block.args, state, view.x_max, value, token);
    outcome.total = totals.weight;
    rank = static_cast<int32_t>(totals.before) + 1;
  } else {
    value = block.value_of(view, token);
    if (plan.greedy) {  // the distribution after step 4
      rank = 1;
      view.listed = false;
      outcome.total = total_of_left<Block>(p, block.args, state, view);
    } else {
      view.cut = outcome.cut;
      if (rank == 0) rank = rank_among_left<Block>(p, block.args, state, view, value, token);
    }
  }
  const float log_sum = log_weight_sum(outcome.total);
  if (block.group.rank == 0 && block.thread == 0) {
    p.logprobs[block.index] = log_probability(value, view.x_max, log_sum);
    if (p.ranks) p.ranks[block.index] = rank;
  }
  if (num_top_tokens(p, block.row()) > 0)
    write_top_tokens<Block>(p, block.args, state, view, scan, log_sum);
  else if (block.group.rank == 0 && block.thread == 0)
    write_no_top_tokens(p, block.index, 0);
  block.parity = state.parity;
}

}  // namespace tokenstep::cuda
