// Kernels in pairs: right, and with one fault planted (kFault).
#pragma once
#include "cuda/warp.cuh"

namespace tokenstep::cuda {

// Device memory of every kernel here, zeros at first.
struct Buffers {
  const int* in;  // kBufferInts ints, in[i] = i; read-only
  int* out;       // kBufferInts ints
  uint32_t* flag;
};
constexpr int kBufferInts = 1024;

__device__ __forceinline__ int* shared_ints() { return reinterpret_cast<int*>(shared_memory()); }
__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int threads() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int global_thread() { return static_cast<int>(blockIdx.x) * threads() + thread(); }
__device__ __forceinline__ int neighbour() { return (thread() + 1) % threads(); }

// ---- shared memory of one block ---------------------------------------------------------------------------
template <bool kFault>
__global__ void missing_barrier(Buffers b) {
  shared_ints()[thread()] = b.in[thread()];
  if (!kFault) __syncthreads();
  b.out[thread()] = shared_ints()[neighbour()];
}

template <bool kFault>
__global__ void missing_barrier_before_reuse(Buffers b) {
  shared_ints()[thread()] = b.in[thread()];
  __syncthreads();
  const int next = shared_ints()[neighbour()];
  if (!kFault) __syncthreads();
  shared_ints()[thread()] = next + 1;
  b.out[thread()] = shared_ints()[thread()];
}

template <bool kFault>
__global__ void missing_barrier_after_clearing(Buffers b) {
  if (thread() == 0) shared_ints()[0] = 0;
  if (!kFault) __syncthreads();
  atomicAdd(shared_ints(), 1);
  __syncthreads();
  b.out[thread()] = shared_ints()[0];
}

template <bool kFault>
__global__ void race_between_warps(Buffers b) {
  if (kFault ? lane_id() == 0 : thread() == 0) shared_ints()[0] = warp_id();
  __syncthreads();
  b.out[thread()] = shared_ints()[0];
}

// A shuffle exchanges values; it does not order memory.
template <bool kFault>
__global__ void shuffle_is_no_barrier(Buffers b) {
  shared_ints()[thread()] = b.in[thread()];
  const int sum = warp_sum(thread());
  if (!kFault) __syncwarp();
  b.out[thread()] = shared_ints()[thread() ^ 1] + sum;
}

// Two halves of a warp go separate ways; each may synchronise among its own lanes only.
template <bool kFault>
__global__ void race_between_halves_of_a_warp(Buffers b) {
  const unsigned half = lane_id() < 16 ? 0x0000ffffu : 0xffff0000u;
  shared_ints()[thread()] = b.in[thread()];
  __syncwarp(half);
  b.out[thread()] = shared_ints()[thread() ^ (kFault ? 16 : 8)];
}

template <bool kFault>
__global__ void shared_out_of_bounds(Buffers b) {
  const int words = threads();  // all that the launch asked for
  shared_ints()[kFault ? words - thread() : thread()] = 1;
  __syncthreads();
  b.out[thread()] = shared_ints()[kFault ? words - thread() : thread()];
}

template <bool kFault>
__global__ void shared_below_its_start(Buffers b) {
  shared_ints()[thread() - kFault] = 1;
  b.out[thread()] = shared_ints()[thread() - kFault];
}

template <bool kFault>
__global__ void shared_across_its_end(Buffers b) {
  int* words = shared_ints();
  for (int i = thread(); i < 82; i += threads()) words[i] = 1;
  __syncthreads();
  const int4 last = *reinterpret_cast<const int4*>(words + (kFault ? 80 : 76));
  b.out[thread()] = last.x + last.y + last.z + last.w;
}

template <bool kFault>
__global__ void shared_memory_that_nobody_wrote(Buffers b) {
  if (kFault ? thread() > 0 : thread() >= 0) shared_ints()[thread()] = 1;
  __syncthreads();
  b.out[thread()] = shared_ints()[neighbour()];
}

template <bool kFault>
__global__ void misaligned(Buffers b) {
  for (int i = 0; i < 2; ++i) shared_ints()[2 * thread() + i] = i;
  __syncthreads();
  b.out[thread()] =
      static_cast<int>(*reinterpret_cast<uint64_t*>(shared_ints() + 2 * (thread() % 8) + kFault));
}

// ---- barriers and warp-wide operations --------------------------------------------------------------------
template <bool kFault>
__global__ void divergent_barrier(Buffers b) {
  if (kFault && thread() % 64 < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  b.out[thread()] = 1;
}

template <bool kFault>
__global__ void barrier_that_one_thread_misses(Buffers b) {
  if (!kFault || thread() != 5) __syncthreads();
  b.out[thread()] = 1;
}

template <bool kFault>
__global__ void named_barrier_of_another_size(Buffers b) {
  sync_warps(3, kFault && warp_id() == 0 ? 32 : 64);
  sync_warps(3, 64);
  b.out[thread()] = 1;
}

template <bool kFault>
__global__ void named_barrier_that_a_warp_misses(Buffers b) {
  if (!kFault || warp_id() == 0) sync_warps(1, 64);
  b.out[thread()] = 1;
}

template <bool kFault>
__global__ void divergent_warp(Buffers b) {
  int x = thread();
  if (kFault && thread() == 3) {
    x = __shfl_xor_sync(kAllLanes, x, 2);
  } else {
    x = __shfl_xor_sync(kAllLanes, x, 1);
  }
  b.out[thread()] = x;
}

template <bool kFault>
__global__ void warp_operation_that_a_lane_misses(Buffers b) {
  if (!kFault || lane_id() != 31) b.out[thread()] = __any_sync(kAllLanes, 1);
}

template <bool kFault>
__global__ void shuffle_from_a_lane_outside_of_the_mask(Buffers b) {
  if (lane_id() < 16) b.out[thread()] = __shfl_sync(0x0000ffffu, thread(), kFault ? 20 : 4);
}

template <bool kFault>
__global__ void mask_without_the_caller(Buffers b) {
  b.out[thread()] = static_cast<int>(__ballot_sync(kFault ? 0x7fffffffu : kAllLanes, 1));
}

// ---- cp.async ---------------------------------------------------------------------------------------------
template <bool kFault>
__global__ void missing_copy_wait(Buffers b) {
  int* mine = shared_ints() + 4 * thread();
  copy_async_16(mine, b.in + 4 * thread());
  copy_async_commit();
  if (!kFault) copy_async_wait<0>();
  b.out[thread()] = mine[0];
  copy_async_wait<0>();
}

// Two groups are on their way and the first is needed: one may stay, not two.
template <bool kFault>
__global__ void copy_wait_for_too_few_groups(Buffers b) {
  int* mine = shared_ints() + 4 * thread();
  for (int stage = 0; stage < 2; ++stage) {
    copy_async_16(mine + stage * 4 * threads(), b.in + 4 * (thread() + stage));
    copy_async_commit();
  }
  copy_async_wait<kFault ? 2 : 1>();
  b.out[thread()] = mine[0];
  copy_async_wait<0>();
}

template <bool kFault>
__global__ void missing_barrier_after_copy_wait(Buffers b) {
  copy_async_16(shared_ints() + 4 * thread(), b.in + 4 * thread());
  copy_async_commit();
  copy_async_wait<0>();
  if (!kFault) __syncthreads();
  b.out[thread()] = shared_ints()[4 * neighbour()];
}

template <bool kFault>
__global__ void copies_in_flight_at_the_end(Buffers b) {
  copy_async_16(shared_ints() + 4 * thread(), b.in + 4 * thread());
  copy_async_commit();
  if (!kFault) copy_async_wait<0>();
}

// ---- clusters ---------------------------------------------------------------------------------------------
template <bool kFault, int kMissing>
__device__ __forceinline__ void read_peer(Buffers b) {
  shared_ints()[thread()] = static_cast<int>(blockIdx.x);
  if (!kFault || kMissing != 0) cluster_sync();
  const uint32_t peer = (cluster_rank() + 1) % cluster_size();
  b.out[global_thread()] = map_to_peer(shared_ints(), peer)[thread()];
  if (!kFault || kMissing != 1) cluster_sync();
}
template <bool kFault>
__global__ void missing_cluster_barrier_before_access(Buffers b) {
  read_peer<kFault, 0>(b);
}
template <bool kFault>
__global__ void missing_cluster_barrier_before_leaving(Buffers b) {
  read_peer<kFault, 1>(b);
}

template <bool kFault>
__global__ void race_in_a_cluster(Buffers b) {
  if (thread() == 0) shared_ints()[0] = 0;
  cluster_sync();
  int* first = map_to_peer(shared_ints(), 0);
  if (thread() == 0) {
    if (kFault) {
      *first += 1;
    } else {
      atomicAdd(first, 1);
    }
  }
  cluster_sync();
  if (cluster_rank() == 0) b.out[global_thread()] = shared_ints()[0];
}

template <bool kFault>
__global__ void block_outside_of_the_cluster(Buffers b) {
  shared_ints()[thread()] = 1;
  cluster_sync();
  b.out[global_thread()] = map_to_peer(shared_ints(), kFault ? cluster_size() : 0)[thread()];
  cluster_sync();
}

template <bool kFault>
__global__ void cluster_arrival_without_wait(Buffers b) {
  cluster_arrive();
  if (!kFault) cluster_wait();
  cluster_arrive();
  cluster_wait();
  b.out[global_thread()] = 1;
}

template <bool kFault>
__global__ void cluster_wait_without_arrival(Buffers b) {
  if (!kFault || cluster_rank() > 0) cluster_arrive();
  cluster_wait();
  b.out[global_thread()] = 1;
}

// ---- between the blocks of a grid: cooperative launches ---------------------------------------------------
// Block 0 writes, sets a flag, and the others read what it wrote.
template <bool kRelease, bool kAcquire>
__device__ __forceinline__ void pass_a_message(Buffers b) {
  if (blockIdx.x == 0) {
    b.out[thread()] = 7;
    __syncthreads();
    if (thread() == 0) {
      if (kRelease) __threadfence();
      atomicExch(b.flag, 1u);
    }
    return;
  }
  if (thread() == 0) {
    while (atomicAdd(b.flag, 0u) == 0) spin_pause();
    if (kAcquire) __threadfence();
  }
  __syncthreads();
  b.out[global_thread()] = b.out[neighbour()];
}
template <bool kFault>
__global__ void missing_fence_before_flag(Buffers b) {
  pass_a_message<!kFault, true>(b);
}
template <bool kFault>
__global__ void missing_fence_after_flag(Buffers b) {
  pass_a_message<true, !kFault>(b);
}

// The same with a releasing store and an acquiring load.
template <bool kFault>
__global__ void missing_acquire(Buffers b) {
  if (blockIdx.x == 0) {
    b.out[thread()] = 7;
    __syncthreads();
    if (thread() == 0) store_release(b.flag, 1);
    return;
  }
  if (thread() == 0) {
    while ((kFault ? *static_cast<volatile uint32_t*>(b.flag) : load_acquire(b.flag)) == 0) spin_pause();
  }
  __syncthreads();
  b.out[global_thread()] = b.out[neighbour()];
}

template <bool kFault>
__global__ void flag_that_nobody_sets(Buffers b) {
  if (blockIdx.x == 0 && thread() == 0) store_release(b.flag, kFault ? 2 : 1);
  while (load_acquire(b.flag) != 1) spin_pause();
  b.out[global_thread()] = 1;
}

template <bool kFault>
__global__ void race_on_global_memory(Buffers b) {
  if (kFault) {
    b.out[0] += 1;
  } else {
    atomicAdd(b.out, 1);
  }
}

// ---- global memory ----------------------------------------------------------------------------------------
template <bool kFault>
__global__ void global_out_of_bounds(Buffers b) {
  b.out[thread()] = b.in[kFault ? kBufferInts - thread() : thread()];
}

template <bool kFault>
__global__ void write_to_read_only_memory(Buffers b) {
  int* target = kFault ? const_cast<int*>(b.in) : b.out;
  target[thread()] = 1;
}

template <bool kFault>
__global__ void non_coherent_read_of_what_was_written(Buffers b) {
  b.out[thread()] = 1;
  __syncthreads();
  const int one = kFault ? __ldg(b.out + neighbour()) : b.out[neighbour()];
  __syncthreads();
  b.out[thread()] = one;
}

template <bool kFault>
__global__ void null_pointer(Buffers b) {
  int* target = kFault && thread() == 9 ? nullptr : b.out + thread();
  *target = 1;
}

// ---- faults of a single thread ----------------------------------------------------------------------------
template <bool kFault>
__global__ void division_by_zero(Buffers b) {
  b.out[thread()] = 100 / (kFault ? b.in[thread()] : b.in[thread()] + 1);
}

__device__ __noinline__ int recurse(volatile int* caller, int depth) {
  volatile int frame[64] = {};
  frame[depth % 64] = *caller;
  const int deeper = depth == 0 ? 0 : recurse(frame, depth - 1);
  return frame[depth % 64] + deeper + *caller;
}
template <bool kFault>
__global__ void stack_overflow(Buffers b) {
  volatile int start = 1;
  b.out[thread()] = recurse(&start, kFault ? 1 << 30 : 3);
}

}  // namespace tokenstep::cuda
