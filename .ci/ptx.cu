// Compiled, not run: every function of ptx.cuh and warp.cuh, for every architecture.
#include "cuda/warp.cuh"

namespace tokenstep::cuda {

__global__ void copy_and_multiply(const void* global, float* out) {
  char* shared = shared_memory();
  copy_async_16(shared + threadIdx.x * 16, global);
  copy_async_commit();
  copy_async_wait<0>();
  sync_warps(1, 32);
  uint32_t a[4], b[4];
  load_matrix_x4(a, shared);
  load_matrix_x4_transposed(b, shared);
  const uint32_t pair[2] = {b[0], b[1]};
  float sums[4] = {};
  mma_m16n8k16<__half>(sums, a, pair);
  mma_m16n8k16<__nv_bfloat16>(sums, a, pair);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = exp2_approx(sums[i]);
}

__global__ void meet_others(const void* global, float* out, uint32_t* flag) {
  cluster_sync();
  prefetch_l2(global);
  const uint4 words = load_streaming(global);
  float* peer = map_to_peer(reinterpret_cast<float*>(shared_memory()), cluster_rank() ^ (cluster_size() - 1));
  out[threadIdx.x] = max_nan(peer[threadIdx.x], warp_inclusive_sum(warp_sum(__uint_as_float(words.x))));
  store_release(flag, 1);
  while (load_acquire(flag) == 0) spin_pause();
  cluster_sync();
}

}  // namespace tokenstep::cuda
