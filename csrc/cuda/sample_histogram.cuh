// Histograms of 64-bit amounts in shared memory, and the bin where a running sum crosses a target.
#pragma once
#include "cuda/sample_block.cuh"

namespace tokenstep::cuda {

template <class Block>
__device__ __forceinline__ void add_to_bin(Block& block, int bin, uint64_t amount) {
  const uint32_t low = static_cast<uint32_t>(amount);
  const uint32_t before = atomicAdd(&block.shared.histogram_low[bin], low);
  const uint32_t high = static_cast<uint32_t>(amount >> 32) + (before + low < before);
  if (high) atomicAdd(&block.shared.histogram_high[bin], high);
}

// A thread's own amounts for the same bin in a row: rows full of ties would otherwise wait for one address.
template <class Block>
struct BinRun {
  Block& block;
  int bin = 0;
  uint64_t amount = 0;

  __device__ __forceinline__ void add(int to_bin, uint64_t more) {
    if (to_bin != bin) {
      flush();
      bin = to_bin;
    }
    amount += more;
  }
  __device__ __forceinline__ void flush() {
    if (amount) add_to_bin(block, bin, amount);
    amount = 0;
  }
};

// Where the running sum over the bins reaches `target`; bin = kBins if it never does.
struct Crossing {
  int bin;
  uint64_t above;   // sum before the bin
  uint64_t total;   // of all bins
  uint64_t target;
};

// Finds the crossing and empties the histogram. target_of(total) tells the target; `of_group` sums the
// histograms of all blocks, and all learn the same.
template <class Block, class TargetOf>
__device__ __forceinline__ Crossing find_crossing(Block& block, bool of_group, TargetOf target_of) {
  constexpr int kOwnBins = kBins / Block::kThreads;
  auto& shared = block.shared;
  const int first = block.thread * kOwnBins;
  const bool merges = Block::kMode != GroupMode::kSolo && of_group;
  uint64_t amount[kOwnBins];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kOwnBins; ++i) {
    const uint32_t low = shared.histogram_low[first + i], high = shared.histogram_high[first + i];
    shared.histogram_low[first + i] = shared.histogram_high[first + i] = 0;
    amount[i] = low | uint64_t{high} << 32;
    if (merges) {
      uint32_t* own = block.own_box().histogram[block.parity] + 2 * (first + i);
      own[0] = low;
      own[1] = high;
    }
  }
  if (merges) {
    const uint32_t copy = block.share();
#pragma unroll
    for (int i = 0; i < kOwnBins; ++i) amount[i] = 0;
    for (int rank = 0; rank < block.group.size; ++rank) {
      const uint32_t* theirs = block.box(rank).histogram[copy] + 2 * first;
#pragma unroll
      for (int i = 0; i < kOwnBins; ++i) amount[i] += block.group.read_pair(theirs + 2 * i);
    }
  }
  uint64_t own_sum = 0;
#pragma unroll
  for (int i = 0; i < kOwnBins; ++i) own_sum += amount[i];
  const uint64_t inclusive = warp_inclusive_sum(own_sum);
  if (block.lane == kWarpSize - 1) shared.warp_sums[0][block.warp] = inclusive;
  __syncthreads();
  const uint64_t of_warp = block.lane < Block::kWarps ? shared.warp_sums[0][block.lane] : 0;
  Crossing crossing;
  crossing.total = crossing.above = warp_sum(of_warp);
  crossing.target = target_of(crossing.total);
  crossing.bin = kBins;
  uint64_t before = warp_sum(block.lane < block.warp ? of_warp : 0) + inclusive - own_sum;
#pragma unroll
  for (int i = 0; i < kOwnBins; ++i) {
    if (before < crossing.target && before + amount[i] >= crossing.target) {
      shared.crossing_bin = first + i;
      shared.above_crossing = before;
    }
    before += amount[i];
  }
  __syncthreads();
  if (crossing.total >= crossing.target) {
    crossing.bin = shared.crossing_bin;
    crossing.above = shared.above_crossing;
  }
  return crossing;
}

}  // namespace tokenstep::cuda
