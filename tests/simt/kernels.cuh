// Right kernels, one for each thing that the emulator does; test_kernels.py knows what each must give.
#pragma once
#include "cuda/element.cuh"
#include "cuda/warp.cuh"

namespace tokenstep::cuda {

// ---- order of threads -------------------------------------------------------------------------------------
// The threads of the grid in the order in which they come by.
__global__ void order_of_arrival(int* out, unsigned* tickets) {
  const int thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  out[atomicAdd(tickets, 1u)] = thread;
}

// Where each thread of a three-dimensional grid of three-dimensional blocks is.
__global__ void positions(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int* mine = out + 6 * (block * (blockDim.x * blockDim.y * blockDim.z) + thread);
  const unsigned at[6] = {blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z};
  for (int i = 0; i < 6; ++i) mine[i] = static_cast<int>(at[i]);
}

// ---- warps ------------------------------------------------------------------------------------------------
// Row by row, what each lane gets from x of its warp; lanes below `split`, and the others, have their own
// mask.
constexpr int kIntrinsics = 16;
__global__ void intrinsics(const int* x, int* out, int split, int width, int argument) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const unsigned below = split == 32 ? kAllLanes : (1u << split) - 1;
  const unsigned mask = lane < split ? below : ~below;
  const int value = x[thread];
  const auto bits = static_cast<unsigned>(value);
  const int results[kIntrinsics] = {
      split == 32 ? __shfl_sync(mask, value, argument, width) : value,
      split == 32 ? __shfl_up_sync(mask, value, static_cast<unsigned>(argument), width) : value,
      split == 32 ? __shfl_down_sync(mask, value, static_cast<unsigned>(argument), width) : value,
      split == 32 ? __shfl_xor_sync(mask, value, argument, width) : value,
      static_cast<int>(__ballot_sync(mask, value > 0)),
      __any_sync(mask, value > 90),
      __all_sync(mask, value > -90),
      static_cast<int>(__match_any_sync(mask, value / 8)),
      __reduce_add_sync(mask, value),
      __reduce_min_sync(mask, value),
      __reduce_max_sync(mask, value),
      static_cast<int>(__reduce_min_sync(mask, bits)),
      static_cast<int>(__reduce_max_sync(mask, bits)),
      static_cast<int>(__reduce_and_sync(mask, bits)),
      static_cast<int>(__reduce_or_sync(mask, bits)),
      static_cast<int>(__reduce_xor_sync(mask, bits)),
  };
  for (int i = 0; i < kIntrinsics; ++i) out[i * static_cast<int>(blockDim.x) + thread] = results[i];
}

__global__ void block_votes(const int* x, int* out) {
  const int value = x[threadIdx.x];
  int* mine = out + 3 * threadIdx.x;
  mine[0] = __syncthreads_count(value > 0);
  mine[1] = __syncthreads_or(value > 90);
  mine[2] = __syncthreads_and(value > -90);
}

// ---- shared memory ----------------------------------------------------------------------------------------
// Inclusive prefix sums over a block, in elements of which several may share a word.
template <class T>
__global__ void prefix_sums(const T* x, T* out) {
  T* values = reinterpret_cast<T*>(shared_memory());
  const unsigned thread = threadIdx.x;
  values[thread] = x[thread];
  __syncthreads();
  for (unsigned offset = 1; offset < blockDim.x; offset *= 2) {
    const T below = thread >= offset ? values[thread - offset] : T();
    __syncthreads();
    values[thread] = static_cast<T>(values[thread] + below);
    __syncthreads();
  }
  out[thread] = values[thread];
}

// Every atomic on a word of shared memory, and one on global memory.
__global__ void atomics(const unsigned* x, unsigned long long* out, unsigned* grid_sum) {
  struct Words {
    unsigned sum, least, most, all, any, odd, turns;
    int least_signed, most_signed;
    unsigned long long long_sum, long_most, swapped;
    float float_sum;
  };
  Words& words = *reinterpret_cast<Words*>(shared_memory());
  if (threadIdx.x == 0) words = {0, ~0u, 0, ~0u, 0, 0, 0, 1 << 30, -(1 << 30), 0, 0, 0, 0.0f};
  __syncthreads();
  const unsigned value = x[threadIdx.x];
  const int number = static_cast<int>(value);
  const unsigned long long wide = 0x100000001ull * value;
  atomicAdd(&words.sum, value);
  atomicMin(&words.least, value);
  atomicMax(&words.most, value);
  atomicAnd(&words.all, value);
  atomicOr(&words.any, value);
  atomicXor(&words.odd, value);
  atomicInc(&words.turns, 9u);
  atomicMin(&words.least_signed, number);
  atomicMax(&words.most_signed, number);
  atomicAdd(&words.long_sum, wide);
  atomicMax(&words.long_most, wide);
  for (unsigned long long seen = 0, now; (now = atomicCAS(&words.swapped, seen, seen + value)) != seen;)
    seen = now;
  atomicAdd(&words.float_sum, 1.0f);
  atomicAdd(grid_sum, value);
  __syncthreads();
  if (threadIdx.x > 0) return;
  const unsigned long long results[] = {words.sum,
                                        words.least,
                                        words.most,
                                        words.all,
                                        words.any,
                                        words.odd,
                                        words.turns,
                                        static_cast<unsigned long long>(words.least_signed),
                                        static_cast<unsigned long long>(words.most_signed),
                                        words.long_sum,
                                        words.long_most,
                                        words.swapped,
                                        static_cast<unsigned long long>(words.float_sum)};
  for (int i = 0; i < 13; ++i) out[13 * blockIdx.x + static_cast<unsigned>(i)] = results[i];
}

// Producer warps fill a slot, consumer warps empty it: named barriers, of which each warp meets two.
__global__ void producer_and_consumer(const int* x, int* out, int rounds) {
  int* slot = reinterpret_cast<int*>(shared_memory());
  const unsigned lane = threadIdx.x % (blockDim.x / 2);
  const bool produces = threadIdx.x < blockDim.x / 2;
  for (int round = 0; round < rounds; ++round) {
    if (produces) slot[lane] = x[static_cast<unsigned>(round) * blockDim.x / 2 + lane];
    sync_warps(1, blockDim.x);
    if (!produces)
      out[static_cast<unsigned>(round) * blockDim.x / 2 + lane] = slot[blockDim.x / 2 - 1 - lane];
    sync_warps(2, blockDim.x);
  }
}

// ---- cp.async ---------------------------------------------------------------------------------------------
// Each thread sums its 16-byte chunks of x through its own ring of three stages; past the end there are
// zeros.
__global__ void ring_sum(const int* x, int* out, int chunks) {
  constexpr int kStages = 3;
  int4* ring = reinterpret_cast<int4*>(shared_memory()) + threadIdx.x * kStages;
  const int4* mine = reinterpret_cast<const int4*>(x) + threadIdx.x * static_cast<unsigned>(chunks);
  for (int i = 0; i < kStages - 1; ++i) {
    copy_async_16(ring + i, mine + i, i < chunks);
    copy_async_commit();
  }
  int sum = 0;
  for (int i = 0; i < chunks; ++i) {
    const int next = i + kStages - 1;
    copy_async_16(ring + next % kStages, mine + next, next < chunks);
    copy_async_commit();
    copy_async_wait<kStages - 1>();
    const int4 chunk = ring[i % kStages];
    sum += chunk.x + chunk.y + chunk.z + chunk.w;
  }
  copy_async_wait<0>();
  out[threadIdx.x] = sum;
}

// ---- clusters ---------------------------------------------------------------------------------------------
// In rounds, each block adds up what its cluster holds; between the barrier's halves there is work.
__global__ void cluster_sum(const int* x, int* out, int rounds) {
  int* held = reinterpret_cast<int*>(shared_memory());
  int value = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int round = 0; round < rounds; ++round) {
    held[threadIdx.x] = value;
    cluster_sync();
    int sum = 0;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) sum += map_to_peer(held, rank)[threadIdx.x];
    __syncwarp();
    cluster_arrive();
    value = sum % 1000 + static_cast<int>(cluster_rank());
    cluster_wait();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

// ---- the blocks of a grid ---------------------------------------------------------------------------------
// A barrier of the grid: what blocks that run together use where there are no clusters.
struct GridBarrier {
  unsigned count, generation;
};
__device__ __forceinline__ void sync_grid(GridBarrier* barrier) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned generation = load_acquire(&barrier->generation);
    __threadfence();
    if (atomicInc(&barrier->count, gridDim.x - 1) == gridDim.x - 1) {
      __threadfence();
      store_release(&barrier->generation, generation + 1);
    } else {
      while (load_acquire(&barrier->generation) == generation) spin_pause();
    }
  }
  __syncthreads();
}

// Each block writes a value a round and reads those of all blocks in the next.
__global__ void grid_sums(int* mail, int* out, GridBarrier* barrier, int rounds) {
  int value = static_cast<int>(blockIdx.x) + 1;
  for (int round = 0; round < rounds; ++round) {
    int* box = mail + static_cast<unsigned>(round % 2) * gridDim.x;
    if (threadIdx.x == 0) box[blockIdx.x] = value;
    sync_grid(barrier);
    int sum = 0;
    for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) sum += box[block];
    value = warp_sum(sum) % 1000 + static_cast<int>(blockIdx.x);
  }
  if (threadIdx.x == 0) out[blockIdx.x] = value;
}

// The block that finishes last adds up what all of them found.
__global__ void last_block_adds_up(const int* x, int* partial, unsigned* finished, int* out) {
  const int sum = warp_sum(x[blockIdx.x * blockDim.x + threadIdx.x]);
  int last = 0;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
    __threadfence();
  }
  if (!__shfl_sync(kAllLanes, last, 0)) return;
  __syncwarp();
  int total = 0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) total += partial[block];
  total = warp_sum(total);
  if (threadIdx.x == 0) *out = total;
}

// ---- tensor cores -----------------------------------------------------------------------------------------
// One warp: c[16, 8] = a[16, 16] b, b as its transpose [8, 16], or as [16, 8] through the transposing load.
template <class Half, bool kTransposed>
__global__ void matmul(const uint4* a, const uint4* b, float* c) {
  uint4* shared = reinterpret_cast<uint4*>(shared_memory());
  const unsigned lane = threadIdx.x;
  shared[lane] = a[lane];  // 16 rows of two chunks
  if (lane < 16) shared[32 + lane] = b[lane];
  __syncwarp();
  // Matrices 0 and 1 of a are rows 0-7 and 8-15 of columns 0-7, matrices 2 and 3 of columns 8-15.
  uint32_t of_a[4], of_b[4];
  load_matrix_x4(of_a, shared + lane % 16 * 2 + lane / 16);
  if (kTransposed) {  // two matrices of b, one above the other: rows of one chunk
    load_matrix_x4_transposed(of_b, shared + 32 + lane % 16);
  } else {  // two side by side: rows of two chunks
    load_matrix_x4(of_b, shared + 32 + lane % 8 * 2 + lane / 8 % 2);
  }
  float sums[4] = {};
  const uint32_t pair[2] = {of_b[0], of_b[1]};
  mma_m16n8k16<Half>(sums, of_a, pair);
  for (unsigned i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// ---- 16-bit floats ----------------------------------------------------------------------------------------
template <class Half>
__device__ __forceinline__ uint16_t bits_of_half(Half h) {
  uint16_t bits;
  memcpy(&bits, &h, sizeof bits);
  return bits;
}

// widened[i] = float(h[i]); narrowed[i] = half(x[i]); most[i] = max(h[i], h[n - 1 - i]), NaN if either is.
template <class Half, class Half2>
__global__ void halves(const Half* h, const float* x, float* widened, uint16_t* narrowed, uint16_t* most,
                       int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
    widened[i] = widen(h[i]);
    narrowed[i] = bits_of_half(narrow<Half>(x[i]));
    Half2 one, other;
    one.x = one.y = h[i];
    other.x = other.y = h[n - 1 - i];
    const Half2 both = __hmax2_nan(one, other);
    most[i] = bits_of_half(both.y);
  }
}

}  // namespace tokenstep::cuda
