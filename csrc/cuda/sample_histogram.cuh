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

// Of a histogram by place in the row: the bin of a place, and how many places a bin has.
__device__ __forceinline__ int bin_of_place(int place) { return min(place / kTokensPerBin, kBins - 1); }
template <class Block>
__device__ __forceinline__ int places_of_bin(int bin) {
  return bin == kBins - 1 ? kTokensPerBin + Block::kUnit : kTokensPerBin;
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

// What a running sum is to reach, as a function of the sum over all.
struct Target {
  enum Kind { kFixed, kTopP, kDraw } kind;
  uint64_t value;  // the target; the weight that top-p refers to, 0: of all; random bits
  float top_p;

  static __device__ __forceinline__ Target fixed(uint64_t value) { return {kFixed, value, 0.0f}; }
  static __device__ __forceinline__ Target share(float top_p, uint64_t of) { return {kTopP, of, top_p}; }
  static __device__ __forceinline__ Target random(uint64_t bits) { return {kDraw, bits, 0.0f}; }

  __device__ __forceinline__ uint64_t operator()(uint64_t all) const {
    if (kind == kFixed) return value;
    return kind == kTopP ? top_p_target(top_p, value ? value : all) : draw_target(value, all) + 1;
  }
};

// Where the running sum over the bins reaches its target; bin = kBins if it never does.
struct Crossing {
  uint64_t above;  // sum before the bin
  uint64_t total;  // of all bins
  uint64_t target;
  int bin;
  uint32_t parity;  // see BlockState
};

template <class Block>
__device__ __noinline__ Crossing search_histogram(BlockState state, bool merges, Target target) {
  Block block = resume<Block>(state);
  constexpr int kOwnBins = kBins / Block::kThreads;
  auto& shared = block.shared;
  const int first = block.thread * kOwnBins;
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
#pragma unroll 1
    for (int rank = 0; rank < block.group.size; ++rank) {
      const uint32_t* place = block.own_box().histogram[copy] + 2 * first;
#pragma unroll
      for (int i = 0; i < kOwnBins; ++i) amount[i] += block.read_peer_pair(place + 2 * i, rank);
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
  crossing.target = target(crossing.total);
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
  crossing.parity = block.parity;
  return crossing;
}

// Finds the crossing and empties the histogram. `of_group` sums the histograms of all blocks, and all learn
// the same.
template <class Block>
__device__ __forceinline__ Crossing find_crossing(Block& block, bool of_group, Target target) {
  const Crossing crossing =
      search_histogram<Block>(suspend(block), Block::kMode != GroupMode::kSolo && of_group, target);
  block.parity = crossing.parity;
  return crossing;
}

}  // namespace tokenstep::cuda
