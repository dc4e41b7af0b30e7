// y = x W^T + bias + residual with a packed matrix: quantised weights are multiplied as they are.
//
// A row of the result has the same bits whatever rows are beside it: each is computed alone, in one fixed
// order.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "cpu/packed_matrix.h"

namespace tokenstep::cpu {

struct LinearParams {
  const PackedMatrix* weights;  // [N, K]
  DType dtype;                  // of x, bias, residual and out: float32, float16 or bfloat16
  int64_t num_rows;             // T
  const void* x;                // [T, K], rows x_stride elements apart
  int64_t x_stride;
  const void* bias;      // [N] or null
  const void* residual;  // [T, N], rows residual_stride apart, or null
  int64_t residual_stride;
  void* out;  // [T, N], contiguous; may be the residual
};

// What the kernel reads beside the weights: x in the type of its arithmetic, and for formats with minima the
// sums of x over each block of columns.
struct LinearInputs {
  const void* x;
  int64_t x_stride;
  const float* sums;  // [T, blocks]
};

void linear(const LinearParams& params);

// out[i] = the numbers of row rows[i], rounded to dtype once: out [count, columns], contiguous.
void gather_rows(const PackedMatrix& weights, const int64_t* rows, int64_t count, DType dtype, void* out);

// Floats that prepare_inputs needs for [x widened], and for the sums.
struct LinearScratch {
  int64_t widened, sums;
};
TOKENSTEP_DECLARE_FOR_EACH_ISA(LinearScratch linear_scratch(const LinearParams& params);
                               LinearInputs prepare_inputs(const LinearParams& params, float* widened,
                                                           float* sums);
                               void store_floats(const float* values, int64_t count, DType dtype, void* out);
                               void linear_tiles(const LinearParams& params, const LinearInputs& inputs,
                                                 int64_t first_tile, int64_t end_tile))

}  // namespace tokenstep::cpu
