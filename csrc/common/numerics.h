// Numerics, version 1. Every value that decides a token or a log probability is computed by these functions,
// which give the same bits on any IEEE-754 machine, host or device: single-rounded fp32 operations and
// explicit fma, and integers from there on. Host code is built with -ffp-contract=off so that no compiler
// fuses what is written apart.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define TOKENSTEP_INLINE static __host__ __device__ __forceinline__
#else
// Internal linkage: the CPU kernels are compiled once per instruction set, and copies must never be merged.
#define TOKENSTEP_INLINE static inline __attribute__((always_inline))
#endif

namespace tokenstep {

constexpr int kNumericsVersion = 1;
constexpr int kWeightBits = 40;  // the weight of the largest token is 2^40

TOKENSTEP_INLINE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
TOKENSTEP_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// ---- fp32 operations, each rounded once to nearest even
// -----------------------------------------------------------
TOKENSTEP_INLINE float mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
TOKENSTEP_INLINE float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
TOKENSTEP_INLINE float sub(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}
TOKENSTEP_INLINE float div(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
TOKENSTEP_INLINE float fma(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// ---- the fixed-point weight of a token
// ---------------------------------------------------------------------------- 2^f on [-0.5, 0.5], degree
// 5, 9.1e-8 relative, exactly 1 at f = 0. The result lies in [0.707, 1.4143].
TOKENSTEP_INLINE float exp2_fraction(float f) {
  float p = fma(0x1.5bba14p-10f, f, 0x1.3cea88p-7f);
  p = fma(p, f, 0x1.c6b752p-5f);
  p = fma(p, f, 0x1.ebf9bcp-3f);
  p = fma(p, f, 0x1.62e42ap-1f);
  return fma(p, f, 1.0f);
}

// 2^40 * exp(d) as an fp32 number, d = x - x_max <= 0. The power of two is added to the exponent of the
// polynomial, so the product is exact and trunc(weight_as_float(d)) == weight(d). Anything below 2^-41 (and
// NaN, -inf) truncates to 0: the clamp at -60 keeps the exponent in range. This form needs no 64-bit shift,
// so that loops vectorise.
TOKENSTEP_INLINE float weight_as_float(float d) {
  float t = mul(d, 0x1.715476p+0f);  // log2(e)
  t = t > -60.0f ? t : -60.0f;
  const float rounded = add(t, 12582912.0f + kWeightBits);  // 1.5 * 2^23: the low bits now hold 40 + round(t)
  const float f = sub(t, sub(rounded, 12582912.0f + kWeightBits));
  return float_from_bits(bits_of(exp2_fraction(f)) + (bits_of(rounded) << 23));
}

// Integer weight of a token, about 2^40 * exp(d). Integer sums do not depend on the order of summation.
TOKENSTEP_INLINE uint64_t weight(float d) {
  return static_cast<uint64_t>(static_cast<int64_t>(weight_as_float(d)));
}

// ---- order of tokens
// ----------------------------------------------------------------------------------------------
// Order-preserving map of fp32 to uint32, with -0 and +0 equal. NaN has no place in it.
TOKENSTEP_INLINE uint32_t ordered_bits(float x) {
  const uint32_t u = bits_of(add(x, 0.0f));
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
TOKENSTEP_INLINE float from_ordered_bits(uint32_t u) {
  return float_from_bits(u & 0x80000000u ? u ^ 0x80000000u : ~u);
}

// ---- logarithms
// --------------------------------------------------------------------------------------------------- ln(1 +
// f), f in [sqrt(1/2) - 1, sqrt(2) - 1], about 1e-7 relative: f - f^2/2 + f^3 * q(f).
TOKENSTEP_INLINE float log1p_fraction(float f) {
  float q = fma(-0x1.38b572p-4f, f, 0x1.055b68p-3f);
  q = fma(q, f, -0x1.0d8544p-3f);
  q = fma(q, f, 0x1.22da1ep-3f);
  q = fma(q, f, -0x1.547244p-3f);
  q = fma(q, f, 0x1.99a008p-3f);
  q = fma(q, f, -0x1.000226p-2f);
  q = fma(q, f, 0x1.555554p-2f);
  return fma(mul(f, f), fma(q, f, -0.5f), f);
}
TOKENSTEP_INLINE float add_exponent_times_ln2(int exponent,
                                              float log_mantissa) {  // ln 2 is split in two floats
  const float e = static_cast<float>(exponent);
  return fma(e, 0x1.62e4p-1f, fma(e, 0x1.7f7d1cp-20f, log_mantissa));
}

// ln(sum / 2^40), 2^40 <= sum < 2^63. The mantissa comes from the integer remainder, so that the result keeps
// its relative accuracy when sum is just above 2^40 (the log probability of a token that has nearly all the
// mass).
TOKENSTEP_INLINE float log_weight_sum(uint64_t sum) {
  int e = 0;
  for (int k = 32; k; k >>= 1)
    if (sum >> (e + k)) e += k;
  const uint64_t one = uint64_t{1} << e;
  int64_t remainder = static_cast<int64_t>(sum - one);
  if (remainder > static_cast<int64_t>(0x6A09E667u * (one >> 32))) {  // mantissa > sqrt(2): 2^(e+1) is nearer
    ++e;
    remainder = static_cast<int64_t>(sum - 2 * one);
  }
  const float f = mul(static_cast<float>(remainder), float_from_bits(static_cast<uint32_t>(127 - e) << 23));
  return add_exponent_times_ln2(e - kWeightBits, log1p_fraction(f));
}

// ln(x) of a positive fp32 number; subnormal numbers are scaled up first.
TOKENSTEP_INLINE float log_float(float x) {
  int e = -127;
  if (x < 0x1p-126f) {
    x = mul(x, 0x1p24f);
    e -= 24;
  }
  uint32_t u = bits_of(x);
  e += static_cast<int>(u >> 23);
  u = (u & 0x7fffffu) | 0x3f800000u;
  if (u > 0x3fb504f3u) {  // mantissa in (0.7071, 1.4142]
    u -= 0x800000u;
    ++e;
  }
  return add_exponent_times_ln2(e, log1p_fraction(sub(float_from_bits(u), 1.0f)));
}

// ---- random bits
// --------------------------------------------------------------------------------------------------
struct Philox4x32 {
  uint32_t word[4];
};
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).
TOKENSTEP_INLINE Philox4x32 philox4x32(Philox4x32 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter.word[0], b = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}
// The 64 random bits of one draw: key = seed, counter = (position, substream, 0), words 1 and 0.
TOKENSTEP_INLINE uint64_t random_bits(uint64_t seed, uint64_t position, uint32_t substream) {
  const Philox4x32 counter = {
      {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), substream, 0}};
  const Philox4x32 out = philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return uint64_t{out.word[1]} << 32 | out.word[0];
}

// ---- draw and top-p cut
// ------------------------------------------------------------------------------------------- floor(bits *
// total / 2^64), in [0, total): the token drawn is the first by id whose inclusive prefix sum exceeds it.
TOKENSTEP_INLINE uint64_t draw_target(uint64_t bits, uint64_t total) {
#ifdef __CUDA_ARCH__
  return __umul64hi(bits, total);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(bits) * total) >> 64);
#endif
}

// max(1, ceil(P * total / 2^32)), P = floor(top_p * 2^32) (exact in double), in 64 bits: total < 2^58 for
// 2^18 tokens.
TOKENSTEP_INLINE uint64_t top_p_target(float top_p, uint64_t total) {
  const uint64_t p = top_p <= 0.0f ? 0 : static_cast<uint64_t>(static_cast<double>(top_p) * 4294967296.0);
  const uint64_t target = p * (total >> 32) + ((p * (total & 0xffffffffu) + 0xffffffffu) >> 32);
  return target ? target : 1;
}

}  // namespace tokenstep
