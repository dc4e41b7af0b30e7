// Vectors of floats as wide as the instruction set that this file is compiled for, written with the
// compiler's vector types so that one source serves all; intrinsics only for what these cannot say. For
// *_kernel.cpp files alone.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#pragma GCC diagnostic push  // GCC 12's own headers leave the unused operand of unmasked AVX-512 forms unset
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "common/dtype.h"
#include "common/numerics.h"
#include "common/quantised.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {  // internal linkage: copies for different instruction sets must never be merged

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using Floats = float __attribute__((vector_size(kLanes * 4)));
using Ints = int32_t __attribute__((vector_size(kLanes * 4)));

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};
struct Float8 {  // e4m3
  uint8_t code;
};
struct Int8 {
  int8_t code;
};

// Calls f with an element of a dtype that queries, new rows and results may have.
template <class F>
void with_element_of(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat16:
      return f(Half{});
    default:
      return f(BFloat{});
  }
}

#define TOKENSTEP_VEC static inline __attribute__((always_inline))

TOKENSTEP_VEC Floats all(float x) { return x - Floats{}; }
TOKENSTEP_VEC Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
TOKENSTEP_VEC void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
TOKENSTEP_VEC Ints bits_of(Floats v) { return reinterpret_cast<Ints>(v); }
TOKENSTEP_VEC Floats floats_of(Ints v) { return reinterpret_cast<Floats>(v); }
TOKENSTEP_VEC Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

TOKENSTEP_VEC Ints iota(int first) {
  Ints v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v + first;
}

// a * b + c: fused where the instruction set has it, else two roundings (its own bits, as any two sets may
// differ).
TOKENSTEP_VEC Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__ARM_FEATURE_FMA)
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return v;
#else
  return a * b + c;
#endif
}

TOKENSTEP_VEC float max_lane(Floats v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m512 all_lanes = reinterpret_cast<__m512>(v);
  const __m256 x = _mm256_max_ps(_mm512_castps512_ps256(all_lanes), _mm512_extractf32x8_ps(all_lanes, 1));
#else
  const __m256 x = reinterpret_cast<__m256>(v);
#endif
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  float largest = v[0];
  for (int i = 1; i < kLanes; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
#endif
}

// In each four lanes: two of a's, then two of b's.
template <int A0, int A1, int B0, int B1>
TOKENSTEP_VEC Floats shuffle_fours(Floats a, Floats b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_shuffle_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                                    A0 | A1 << 2 | B0 << 4 | B1 << 6));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_shuffle_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b),
                                                    A0 | A1 << 2 | B0 << 4 | B1 << 6));
#else
  return __builtin_shufflevector(a, b, A0, A1, 4 + B0, 4 + B1);
#endif
}

// ---- narrow elements --------------------------------------------------------------------------------------
// Scalar forms: exact widening; rounding to nearest even as the hardware does it (NaN stays NaN, made quiet;
// of one byte: quantised.h).
TOKENSTEP_VEC float widen(float x) { return x; }
TOKENSTEP_VEC float widen(BFloat x) { return float_from_bits(uint32_t{x.bits} << 16); }
TOKENSTEP_VEC float widen(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu, sign = (x.bits & 0x8000u) << 16;
  // The exponent is rebased by a product, exact for subnormal numbers too.
  const uint32_t finite = tokenstep::bits_of(float_from_bits(magnitude << 13) * 0x1p112f);
  return float_from_bits(sign | (magnitude >= 0x7c00u ? 0x7f800000u | magnitude << 13 : finite));
}
TOKENSTEP_VEC float widen(Float8 x) { return float_from_e4m3(x.code); }
TOKENSTEP_VEC float widen(Int8 x) { return float_from_int8(x.code); }

TOKENSTEP_VEC void narrow(float x, Float8& out) { out.code = e4m3_from_float(x); }
TOKENSTEP_VEC void narrow(float x, Int8& out) { out.code = int8_from_float(x); }
TOKENSTEP_VEC void narrow(float x, float& out) { out = x; }
TOKENSTEP_VEC void narrow(float x, BFloat& out) {
  const uint32_t u = tokenstep::bits_of(x);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<uint16_t>(nan ? 0x7fc0u | u >> 16 : (u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
TOKENSTEP_VEC void narrow(float x, Half& out) {
  const uint32_t u = tokenstep::bits_of(x), magnitude = u & 0x7fffffffu, sign = u >> 16 & 0x8000u;
  // Normal range: rebase the exponent, round the 13 bits away. Below 2^-14: an addition aligns and rounds.
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  const uint32_t tiny = tokenstep::bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t huge = magnitude > 0x7f800000u ? 0x7e00u | (magnitude >> 13 & 0x3ffu) : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? tiny : normal;
  out.bits = static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? huge : finite));
}

// Float8 as a half: with the exponent's bias of 15 for 7 it has 2^-8 of its value, and the CPU widens it,
// subnormal numbers too. Bit 14 gets a copy of the sign at first; adding one unit changes it for the code of
// NaN alone (1.875 otherwise), so that the exclusive or leaves it set just there.
#if defined(__AVX2__)
using Codes = int8_t __attribute__((vector_size(kLanes)));
using Halves = int16_t __attribute__((vector_size(kLanes * 2)));
TOKENSTEP_VEC Halves halves_of(Codes codes) {
  const Halves placed = __builtin_convertvector(codes, Halves) << 7;
  return placed ^ ((placed + 0x80) & 0x4000);
}
#endif

// kLanes elements as floats.
#if defined(__AVX512F__)
TOKENSTEP_VEC Floats widen_lanes(__m256i bits, Half) {
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(bits));
}
TOKENSTEP_VEC Floats widen_lanes(__m256i bits, BFloat) {
  return reinterpret_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
TOKENSTEP_VEC Floats widen_lanes(__m128i codes, Float8) {
  return widen_lanes(reinterpret_cast<__m256i>(halves_of(reinterpret_cast<Codes>(codes))), Half{}) * 0x1p8f;
}
TOKENSTEP_VEC Floats widen_lanes(__m128i codes, Int8) {
  return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)));
}
template <class T>
TOKENSTEP_VEC Floats load(const T* p) {
  if constexpr (sizeof(T) == 1)
    return widen_lanes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
  else
    return widen_lanes(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
#else
TOKENSTEP_VEC Floats load(const BFloat* p) {
  uint16_t bits __attribute__((vector_size(kLanes * 2)));
  memcpy(&bits, p, sizeof bits);
  return floats_of(__builtin_convertvector(bits, Ints) << 16);
}
TOKENSTEP_VEC Floats load(const Int8* p) {
  int8_t codes __attribute__((vector_size(kLanes)));
  memcpy(&codes, p, sizeof codes);
  return __builtin_convertvector(__builtin_convertvector(codes, Ints), Floats);
}
#if defined(__AVX2__)
TOKENSTEP_VEC Floats load(const Half* p) {
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
TOKENSTEP_VEC Floats load(const Float8* p) {
  Codes codes;
  memcpy(&codes, p, sizeof codes);
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(halves_of(codes)))) * 0x1p8f;
}
#else
template <class T>
TOKENSTEP_VEC Floats load(const T* p) {
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
  return v;
}
#endif
#endif

// kLanes floats, rounded to nearest even as narrow() does it.
TOKENSTEP_VEC void store(BFloat* p, Floats v) {
  using Words = uint32_t __attribute__((vector_size(kLanes * 4)));
  const Words bits = reinterpret_cast<Words>(v);
  const Ints magnitude = bits_of(v) & 0x7fffffff;
  const Words rounded =
      magnitude > 0x7f800000 ? 0x7fc0u | bits >> 16 : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const auto halves = __builtin_convertvector(rounded, uint16_t __attribute__((vector_size(kLanes * 2))));
  memcpy(p, &halves, sizeof halves);
}
TOKENSTEP_VEC void store(Half* p, Floats v) {
#if defined(__AVX512F__)
  const __m256i halves = _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
  memcpy(p, &halves, sizeof halves);
#elif defined(__AVX2__)
  const __m128i halves = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
  memcpy(p, &halves, sizeof halves);
#else
  for (int i = 0; i < kLanes; ++i) narrow(v[i], p[i]);
#endif
}

// The first `count` lanes, zeros beyond; count >= kLanes: all. A masked load and not a branch: loops stay
// whole. Rows have a multiple of 8 elements, so that only 16 lanes can reach past their end.
#if defined(__AVX512F__)
TOKENSTEP_VEC __mmask16 first_lanes(int count) { return static_cast<__mmask16>(count < 16 ? 0xff : 0xffff); }
TOKENSTEP_VEC Floats load_first(const float* p, int count) {
  return reinterpret_cast<Floats>(_mm512_maskz_loadu_ps(first_lanes(count), p));
}
template <class T>
TOKENSTEP_VEC Floats load_first(const T* p, int count) {
  if constexpr (sizeof(T) == 1)
    return widen_lanes(_mm_maskz_loadu_epi8(first_lanes(count), p), T{});
  else
    return widen_lanes(_mm256_maskz_loadu_epi16(first_lanes(count), p), T{});
}
#else
template <class T>
TOKENSTEP_VEC Floats load_first(const T* p, int) {
  return load(p);
}
#endif

// ---- functions --------------------------------------------------------------------------------------------
// 2^t for t <= 0 in about 1.5 ulp; exactly 1 at 0, exactly 0 below 2^-126. NaN stays.
TOKENSTEP_VEC Floats exp2(Floats t) {
  const Floats magic =
      all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  const Floats clamped = t < -126.0f ? all(-126.0f) : t;
  const Floats rounded = clamped + magic;
  const Floats f = clamped - (rounded - magic);
  Floats p = multiply_add(all(0x1.5bba14p-10f), f, all(0x1.3cea88p-7f));  // as numerics.h exp2_fraction
  p = multiply_add(p, f, all(0x1.c6b752p-5f));
  p = multiply_add(p, f, all(0x1.ebf9bcp-3f));
  p = multiply_add(p, f, all(0x1.62e42ap-1f));
  p = multiply_add(p, f, all(1.0f));
  // The power of two is a factor of its own, so that any NaN comes out as one.
  const Floats power = floats_of((bits_of(rounded) << 23) + (127 << 23));
  return t < -126.0f ? Floats{} : p * power;
}

// A few ulp everywhere: a polynomial (Cephes' tanhf) near 0, where 1 - 2 / (e^2x + 1) would cancel.
TOKENSTEP_VEC Floats tanh(Floats x) {
  const Floats magnitude = floats_of(bits_of(x) & 0x7fffffff);
  const Floats e = exp2(magnitude * -2.885390081777927f);  // e^-2|x|
  const Floats far = (1.0f - e) / (1.0f + e);
  const Floats z = x * x;
  Floats p = multiply_add(all(-5.70498872745e-3f), z, all(2.06390887954e-2f));
  p = multiply_add(p, z, all(-5.37397155531e-2f));
  p = multiply_add(p, z, all(1.33314422036e-1f));
  p = multiply_add(p, z, all(-3.33332819422e-1f));
  const Floats near = multiply_add(p * z, x, x);
  const Floats signed_far = floats_of(bits_of(far) | (bits_of(x) & static_cast<int32_t>(0x80000000u)));
  return magnitude < 0.625f ? near : signed_far;
}

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
