// The blocks that share a row, and how they see one another's boxes. All modes run the same code and give the
// same bits: what is exchanged are integer sums, maxima and candidates.
#pragma once
#include "cuda/sample_types.cuh"

namespace tokenstep::cuda {

// Kernels of modes that an architecture lacks are compiled empty, and never launched.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <GroupMode kMode>
constexpr bool kExistsHere = kMode != GroupMode::kCluster;
#else
template <GroupMode kMode>
constexpr bool kExistsHere = true;
#endif

template <GroupMode kMode>
struct Group {
  int size, rank, index;

  __device__ __forceinline__ explicit Group(const GroupArgs& args) {
    size = kMode == GroupMode::kSolo ? 1 : args.size;
    const int block = static_cast<int>(blockIdx.x);
    index = block / size;
    rank = kMode == GroupMode::kCluster ? static_cast<int>(cluster_rank()) : block - index * size;
  }

  // The box of another block, given this block's own.
  template <class Box>
  __device__ __forceinline__ Box* box_of(Box* own, int other) const {
    if constexpr (kMode == GroupMode::kCluster) return map_to_peer(own, static_cast<uint32_t>(other));
    if constexpr (kMode == GroupMode::kSoft) return own + (other - rank);
    return own;
  }
  // A word of another block's box: L1 does not follow what other blocks write to global memory.
  static __device__ __forceinline__ uint32_t read(const uint32_t* word) {
    return kMode == GroupMode::kSoft ? __ldcg(word) : *word;
  }
  static __device__ __forceinline__ uint64_t read_pair(const uint32_t* words) {
    return read(words) | uint64_t{read(words + 1)} << 32;
  }

  // All threads of all blocks.
  __device__ __forceinline__ void sync(const GroupArgs& args) const {
    if constexpr (kMode == GroupMode::kCluster) {
      cluster_sync();
    } else if constexpr (kMode == GroupMode::kSoft) {
      __syncthreads();
      if (threadIdx.x == 0) wait_for_others(args.barriers + index);
      __syncthreads();
    } else {
      __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ void wait_for_others(SoftBarrier* barrier) const {
    const uint32_t generation = load_acquire(&barrier->generation);
    const uint32_t last = static_cast<uint32_t>(size) - 1;
    __threadfence();
    if (atomicInc(&barrier->arrived, last) == last) {
      __threadfence();
      store_release(&barrier->generation, generation + 1);
    } else {
      while (load_acquire(&barrier->generation) == generation) spin_pause();
    }
    __threadfence();
  }
};

}  // namespace tokenstep::cuda
