// The usual end: the lists of all blocks hold few tokens together. The group's first block gathers them,
// ranks them by comparing all pairs, and cuts and draws without a histogram.
#pragma once
#include "cuda/sample_weigh.cuh"

namespace tokenstep::cuda {

struct Lists {
  uint32_t size;    // of the lists of all blocks together
  bool overflow;    // one is longer than its block can hold
  uint64_t weight;  // of all, if asked for
};

// Tells all blocks the sizes and weights of the lists. Afterwards the first tokens of each list can be
// ranked.
template <class Block>
__device__ __forceinline__ Lists share_lists(Block& block, uint32_t capacity, bool with_weight = false,
                                             uint64_t own_weight = 0) {
  __syncthreads();
  if (block.thread == 0) {
    uint32_t* mail = block.own_box().mail[block.parity];
    mail[0] = block.shared.list_size;
    mail[2] = static_cast<uint32_t>(own_weight);
    mail[3] = static_cast<uint32_t>(own_weight >> 32);
  }
  const uint32_t copy = block.share();
  Lists lists = {0, false, 0};
#pragma unroll
  for (int rank = 0; rank < kMaxGroupSize; ++rank) {  // all loads at once: remote ones take long
    if (rank >= block.group.size) break;
    const uint32_t size = block.read_peer(block.own_box().mail[copy], rank);
    lists.size += size;
    lists.overflow |= size > capacity;
  }
  if (with_weight)
#pragma unroll 1
    for (int rank = 0; rank < block.group.size; ++rank)
      lists.weight += block.read_peer_pair(block.own_box().mail[copy] + 2, rank);
  return lists;
}

// After share_lists(), if all tokens are few: brings them to shared.few, in any order, with the rank of each
// in the order of tokens and the weight before it.
template <class Block>
__device__ __noinline__ void rank_lists(BlockState state, float x_max, int count) {
  Block block = resume<Block>(state);
  auto& shared = block.shared;
  const uint32_t copy = block.parity ^ 1;
  const int of = block.thread % kMaxGroupSize;  // the block whose list this thread copies from
  uint32_t begin = 0, size = 0;
#pragma unroll
  for (int rank = 0; rank < kMaxGroupSize; ++rank) {  // all loads at once: remote ones take long
    const uint32_t listed = rank < block.group.size ? block.read_peer(block.own_box().mail[copy], rank) : 0;
    if (rank < of) begin += listed;
    if (rank == of) size = listed;
  }
  if (of < block.group.size) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(block.own_box().few[copy]);
#pragma unroll 1
    for (uint32_t i = block.thread / kMaxGroupSize; i < size; i += Block::kThreads / kMaxGroupSize) {
      const Candidate token = {__uint_as_float(block.read_peer(from + 2 * i, of)),
                               static_cast<int32_t>(block.read_peer(from + 2 * i + 1, of))};
      shared.few[begin + i] = token;
      shared.few_weight[begin + i] = block.weight_of(token.value, block.tempered_late(x_max));
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = block.warp; i < count; i += Block::kWarps) {
    const Candidate own = shared.few[i];
    uint32_t rank = 0;
    uint64_t before = 0;
    for (int j = block.lane; j < count; j += kWarpSize) {
      const Candidate other = shared.few[j];
      if (!comes_before(other.value, other.id, own.value, own.id)) continue;
      ++rank;
      before += shared.few_weight[j];
    }
    rank = __reduce_add_sync(kAllLanes, rank);
    before = warp_sum(before);
    if (block.lane == 0) {
      shared.few_rank[i] = static_cast<int32_t>(rank);
      shared.weight_before[i] = before;
    }
  }
  __syncthreads();
}

// How many of the ranked tokens are at least `least`, a prefix of them.
template <class Block>
__device__ __forceinline__ int count_few_from(const Block& block, int count, float least) {
  uint32_t size = 0;
#pragma unroll 1
  for (int i = block.lane; i < count; i += kWarpSize) size += block.shared.few[i].value >= least;
  return static_cast<int>(__reduce_add_sync(kAllLanes, size));
}

// How many of the ranked tokens are the `most` first, or equal the last of these.
template <class Block>
__device__ __forceinline__ int count_few_with_ties(const Block& block, int count, int most) {
  uint32_t last = 0;
#pragma unroll 1
  for (int i = block.lane; i < count; i += kWarpSize)
    if (block.shared.few_rank[i] == most - 1) last = ordered_bits(block.shared.few[i].value);
  return count_few_from(block, count, from_ordered_bits(__reduce_max_sync(kAllLanes, last)));
}

// Weighs the ranked tokens again, where these are tempered after the cuts.
template <class Block>
__device__ __forceinline__ void weigh_few(Block& block, int count, float x_max) {
  __syncthreads();
#pragma unroll 1
  for (int i = block.thread; i < count; i += Block::kThreads)
    block.shared.few_weight[i] = block.weight_of(block.shared.few[i].value, block.tempered_late(x_max));
  __syncthreads();
}

// Steps 7 and 8 on ranked tokens: how many are left. `total` is the weight that top-p refers to, 0: of the k
// first.
template <class Block>
__device__ __forceinline__ int cut_few(const Block& block, int count, int top_k, bool keeps_ties, float top_p,
                                       uint64_t total) {
  auto& shared = block.shared;
  int most = top_k > 0 ? min(top_k, count) : count;
  if (keeps_ties && top_k > 0) most = count_few_with_ties(block, count, most);
  if (!(top_p < 1.0f)) return most;
  if (total == 0) {
#pragma unroll 1
    for (int i = block.lane; i < count; i += kWarpSize)
      if (shared.few_rank[i] < most) total += shared.few_weight[i];
    total = warp_sum(total);
  }
  const uint64_t target = top_p_target(top_p, total);
  int left = 0;
#pragma unroll 1
  for (int i = block.lane; i < count; i += kWarpSize)
    left += shared.few_rank[i] < most && shared.weight_before[i] < target;
  return static_cast<int>(__reduce_add_sync(kAllLanes, static_cast<uint32_t>(left)));
}

// Step 9 on ranked tokens of which `left` are left. The result lies in shared memory after a barrier.
template <class Block>
__device__ __forceinline__ uint64_t draw_few(Block& block, int count, int left, uint64_t bits) {
  auto& shared = block.shared;
  uint64_t total = 0;
#pragma unroll 1
  for (int i = block.lane; i < count; i += kWarpSize)
    if (shared.few_rank[i] < left) total += shared.few_weight[i];
  total = warp_sum(total);
  const uint64_t target = draw_target(bits, total);
#pragma unroll 1
  for (int i = block.warp; i < count; i += Block::kWarps) {
    const int rank = shared.few_rank[i];
    if (rank >= left) continue;  // the same for all lanes
    const int32_t id = shared.few[i].id;
    uint64_t before = 0;  // weight of the smaller ids
    for (int j = block.lane; j < count; j += kWarpSize)
      if (shared.few[j].id < id && shared.few_rank[j] < left) before += shared.few_weight[j];
    before = warp_sum(before);
    if (block.lane == 0 && before <= target && target - before < shared.few_weight[i]) {
      shared.found_token = id;
      shared.found_rank = rank + 1;
    }
  }
  return total;
}

// The last token that is left, for shared.found_cut.
template <class Block>
__device__ __forceinline__ void find_cut_of_few(Block& block, int count, int left) {
#pragma unroll 1
  for (int i = block.thread; i < count; i += Block::kThreads)
    if (block.shared.few_rank[i] == left - 1)
      block.shared.found_cut = {block.shared.few[i].value, block.shared.few[i].id};
}

}  // namespace tokenstep::cuda
