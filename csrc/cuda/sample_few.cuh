// The usual end: the lists of all blocks hold few tokens together. The group's first block gathers them, ranks
// them by comparing all pairs, and cuts and draws without a histogram.
#pragma once
#include "cuda/sample_weigh.cuh"

namespace tokenstep::cuda {

struct Lists {
  uint32_t size;    // of the lists of all blocks together
  bool overflow;    // one is longer than its block can hold
  uint64_t weight;  // of what they hold, if asked for
};

// Tells all blocks the sizes of the lists. Afterwards the first tokens of each can be gathered.
template <class Block>
__device__ __forceinline__ Lists share_lists(Block& block, uint32_t capacity, uint64_t own_weight) {
  auto& shared = block.shared;
  __syncthreads();
  if (block.thread == 0) {
    uint32_t* mail = block.own_box().mail[block.parity];
    mail[0] = shared.list_size;
    mail[1] = static_cast<uint32_t>(own_weight);
    mail[2] = static_cast<uint32_t>(own_weight >> 32);
  }
  const uint32_t copy = block.share();
  Lists lists = {0, false, 0};
#pragma unroll
  for (int rank = 0; rank < kMaxGroupSize; ++rank) {
    if (rank >= block.group.size) break;
    const uint32_t* mail = block.box(rank).mail[copy];
    const uint32_t size = block.group.read(mail);
    lists.size += size;
    lists.overflow |= size > capacity;
    lists.weight += block.group.read_pair(mail + 1);
  }
  return lists;
}

// After share_lists(), if all tokens are few: to shared.few, in any order.
template <class Block>
__device__ __forceinline__ void gather(Block& block) {
  const uint32_t copy = block.parity ^ 1;
  const int rank = block.thread % kMaxGroupSize;  // whose list this thread copies from
  uint32_t begin = 0, size = 0;
#pragma unroll
  for (int other = 0; other < kMaxGroupSize; ++other) {  // all loads at once: remote ones take long
    const uint32_t of_other = other < block.group.size ? block.group.read(block.box(other).mail[copy]) : 0;
    if (other < rank) begin += of_other;
    if (other == rank) size = of_other;
  }
  if (rank < block.group.size) {
    const Candidate* from = block.box(rank).few[copy];
#pragma unroll 1
    for (uint32_t i = block.thread / kMaxGroupSize; i < size; i += Block::kThreads / kMaxGroupSize) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(from + i);
      block.shared.few[begin + i] = {__uint_as_float(block.group.read(words)),
                                     static_cast<int32_t>(block.group.read(words + 1))};
    }
  }
  __syncthreads();
}

// Rank of each of the few tokens in the order, and the weight before it.
template <class Block>
__device__ __forceinline__ void rank_few(Block& block, const View& view, int count) {
  auto& shared = block.shared;
#pragma unroll 1
  for (int i = block.thread; i < count; i += Block::kThreads)
    shared.few_weight[i] = weight(distance_from_max(shared.few[i].value, view.x_max));
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

// Steps 7 and 8 on ranked tokens: how many are left. `total` is the weight that top-p refers to, 0: of the k
// first.
template <class Block>
__device__ __forceinline__ int cut_few(const Block& block, int count, int top_k, float top_p, uint64_t total) {
  auto& shared = block.shared;
  const int most = top_k > 0 ? min(top_k, count) : count;
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
