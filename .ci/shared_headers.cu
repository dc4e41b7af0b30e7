// Compiled, not run: what CPU and CUDA share must build as device code for every architecture, without spills.
#include "common/numerics.h"
#include "common/params.h"
#include "common/sampling_rules.h"

namespace tokenstep {

__global__ void use_shared_headers(const float* x, uint64_t* weights, float* logs, RowParams row) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  weights[i] = weight(x[i]) + top_p_target(row.top_p, weights[i]) +
               draw_target(random_bits(row.seed, row.position, row.substream), weights[i]) + ordered_bits(x[i]);
  logs[i] = log_weight_sum(weights[i]) + log_float(x[i]);
}

}  // namespace tokenstep
