// The small operations between a decoder's matrix products: RMSNorm, the gate of a gated MLP, the soft cap of
// logits. They read and write each element once, compute in float32 and round once. A row is computed alone,
// in one fixed order: its bits do not depend on other rows, nor on the number of threads.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace tokenstep::cpu {

// out[t, h] = x[t, h] / sqrt(mean(x[t, h]²) + eps) * weight[h], over the last axis (Zhang and Sennrich, arXiv
// 1910.07467). H > 1: heads that are normed one by one.
struct RmsNormParams {
  DType dtype, weight_dtype;  // float32, float16 or bfloat16
  int64_t num_rows;           // T
  int32_t num_heads, size;    // H, D
  const void* x;              // [T, H, D]
  int64_t x_row_stride, x_head_stride;
  const void* weight;  // [H, D], contiguous
  float eps;
  void* out;  // [T, H, D], contiguous
};

enum class Activation : int32_t { kSilu, kGeluTanh };

// out[t, i] = activation(gate[t, i]) * up[t, i] (Shazeer, arXiv 2002.05202).
struct GateParams {
  DType dtype;
  Activation activation;
  int64_t num_rows;     // T
  int32_t size;         // I
  const void* gate_up;  // [T, 2 I], gate first
  int64_t row_stride;
  void* out;  // [T, I], contiguous
};

// x[t, i] = cap * tanh(x[t, i] / cap), in place (Gemma 2, arXiv 2408.00118).
struct SoftCapParams {
  DType dtype;
  float cap;
  int64_t num_rows;  // T
  int32_t size;
  void* x;  // [T, size]
  int64_t row_stride;
};

void rms_norm(const RmsNormParams& params);
void gate(const GateParams& params);
void soft_cap(const SoftCapParams& params);

// Rows [begin, end) of them.
TOKENSTEP_DECLARE_FOR_EACH_ISA(void rms_norm_rows(const RmsNormParams& params, int64_t begin, int64_t end);
                               void gate_rows(const GateParams& params, int64_t begin, int64_t end);
                               void soft_cap_rows(const SoftCapParams& params, int64_t begin, int64_t end))

}  // namespace tokenstep::cpu
