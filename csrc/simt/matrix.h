// Tensor-core operations in software.
#pragma once
#include <cstdint>
#include <source_location>

namespace tokenstep::simt {

// ldmatrix.x2 and .x4: lane l names row l % 8 of matrix l / 8, if there is one.
template <int kMatrices>
void load_matrices(uint32_t (&registers)[kMatrices], const void* row, bool transposed,
                   std::source_location where);

// mma.m16n8k16: c += a * b of bfloat16 or of float16.
void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16,
                       std::source_location where);

}  // namespace tokenstep::simt
