// The blocks that share a row, and how they see one another's boxes. All modes run the same code and give the
// same bits: what is exchanged are integer sums, maxima and candidates.
#pragma once
#include "cuda/sample_types.cuh"

namespace tokenstep::cuda {

// An architecture has one kind of group of several blocks. Kernels of the other are compiled empty and never
// launched.
#ifdef TOKENSTEP_SIMT
template <GroupMode kMode>
constexpr bool kExistsHere = true;
#else
#if __CUDA_ARCH__ >= 900
constexpr GroupMode kAbsentMode = GroupMode::kSoft;
#else
constexpr GroupMode kAbsentMode = GroupMode::kCluster;
#endif
template <GroupMode kMode>
constexpr bool kExistsHere = kMode != kAbsentMode;
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

  // A word of another block's box, at the place where `own` lies in this block's.
  template <class Box>
  __device__ __forceinline__ uint32_t read(const uint32_t* own, int other) const {
    if constexpr (kMode == GroupMode::kCluster) return load_from_peer(own, static_cast<uint32_t>(other));
    if constexpr (kMode == GroupMode::kSoft) {  // L1 does not follow what other blocks write to global memory
      constexpr int kBoxWords = sizeof(Box) / sizeof(uint32_t);
      return __ldcg(own + (other - rank) * kBoxWords);
    }
    return *own;
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
  }
};

}  // namespace tokenstep::cuda
