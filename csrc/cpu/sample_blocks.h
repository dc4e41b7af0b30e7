// Block kernels: the only code that touches all V logits. A block is kBlock consecutive tokens as float32 (a
// short last block is padded with -inf by whoever reads it). The plain loops are written so that compilers
// vectorise them; AVX-512 versions stand beside them in sample_blocks_avx512.h. All give the same bits.
// Included by sample_kernel.cpp alone.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/numerics.h"
#include "common/sampling_rules.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

constexpr int kBlock = 256;
constexpr int kMaskWords = kBlock / 32;

// Below this log2 of (largest weight / 2^40), the weights of a block that share a 32-bit lane sum to less
// than 2^31.
constexpr float kNarrowSumBelow = -13.5f;
constexpr float kLog2E = 0x1.715476p+0f;

// The element types of logits. bfloat16 is its upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};
TOKENSTEP_INLINE float to_float(float x) { return x; }
TOKENSTEP_INLINE float to_float(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }
TOKENSTEP_INLINE float to_float(_Float16 x) { return static_cast<float>(x); }

// Order-preserving map of the bits of a float to a signed integer; NaN lies beyond the infinities.
TOKENSTEP_INLINE int32_t ordered_int(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
TOKENSTEP_INLINE int16_t ordered_int(int16_t bits) {
  return static_cast<int16_t>(bits ^ ((bits >> 15) & 0x7fff));
}

// Largest value of a block of 16-bit floats; `bad` becomes true if one is NaN.
template <class Half>
float max_of_halves(const Half* x, bool& bad) {
  constexpr bool kIsBFloat16 = __is_same(Half, BFloat16);
  constexpr int kInfinityBits = kIsBFloat16 ? 0x7f80 : 0x7c00;
  int16_t largest = INT16_MIN, least = INT16_MAX;
  for (int i = 0; i < kBlock; ++i) {
    int16_t bits;
    memcpy(&bits, x + i, sizeof bits);
    const int16_t value = ordered_int(bits);
    largest = largest > value ? largest : value;
    least = least < value ? least : value;
  }
  bad |= largest > kInfinityBits || least < -kInfinityBits - 1;
  const int16_t bits = ordered_int(largest);
  Half result;
  memcpy(&result, &bits, sizeof bits);
  return to_float(result);
}

// 2^40 * exp(x * scale - x_max) before truncation.
TOKENSTEP_INLINE float weight_of(float x, float scale, float x_max) {
  return weight_as_float(sub(mul(x, scale), x_max));
}

// Weights of a block, one by one.
inline void weights_of_block(const float* x, float scale, float x_max, uint64_t* out) {
  for (int i = 0; i < kBlock; ++i)
    out[i] = static_cast<uint64_t>(static_cast<int64_t>(weight_of(x[i], scale, x_max)));
}

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE

#if defined(__AVX512F__)
#include "cpu/sample_blocks_avx512.h"
#else
#include "cpu/sample_blocks_plain.h"
#endif
