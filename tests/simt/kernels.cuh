// Small kernels for the tests of the emulator.
#pragma once
#include "cuda/warp.cuh"

namespace tokenstep::cuda {

// Sum of n floats per block: a strided loop, warp sums, one barrier.
__global__ void block_sum(const float* x, float* out, int n) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x))
    sum += x[static_cast<int>(blockIdx.x) * n + i];
  sum = warp_sum(sum);
  if (lane_id() == 0) sums[warp_id()] = sum;
  __syncthreads();
  if (warp_id() == 0) {
    sum = warp_sum(lane_id() < static_cast<int>(blockDim.x) / kWarpSize ? sums[lane_id()] : 0.0f);
    if (lane_id() == 0) out[blockIdx.x] = sum;
  }
}

}  // namespace tokenstep::cuda
