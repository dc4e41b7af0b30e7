// Block kernels with AVX-512 (see sample_blocks.h and, for what each computes, sample_blocks_plain.h).
// Against the compiler's own vectors they win 2-3x where tokens are collected, and 1.3x on the sums.
#pragma once
#if defined(__GNUC__) && \
    !defined(__clang__)  // its own header warns of registers that it means to be undefined
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

constexpr int kLanes = 16;

inline float max_of_block(const float* x, bool& bad) {
  __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + kLanes);
  __mmask16 unordered = _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);  // one comparison checks two vectors for NaN
  for (int i = 2 * kLanes; i < kBlock; i += 2 * kLanes) {
    const __m512 c = _mm512_loadu_ps(x + i), d = _mm512_loadu_ps(x + i + kLanes);
    a = _mm512_max_ps(a, c);
    b = _mm512_max_ps(b, d);
    unordered |= _mm512_cmp_ps_mask(c, d, _CMP_UNORD_Q);
  }
  bad |= unordered != 0;
  return _mm512_reduce_max_ps(_mm512_max_ps(a, b));
}

inline __mmask16 mask_of_group(const uint32_t* words, int group) {
  return static_cast<__mmask16>(words[group / 2] >> (group % 2 * 16));
}

inline void mask_block(const float* x, const uint32_t* words, float* out) {
  for (int group = 0; group < kBlock / kLanes; ++group)
    _mm512_storeu_ps(
        out + group * kLanes,
        _mm512_mask_loadu_ps(_mm512_set1_ps(-kInfinity), mask_of_group(words, group), x + group * kLanes));
}

inline float max_of_allowed(const float* x, const uint32_t* words) {
  __m512 largest = _mm512_set1_ps(-kInfinity);
  for (int group = 0; group < kBlock / kLanes; ++group)
    largest = _mm512_mask_max_ps(largest, mask_of_group(words, group), largest,
                                 _mm512_loadu_ps(x + group * kLanes));
  return _mm512_reduce_max_ps(largest);
}

// weight_as_float() of sixteen tokens, with two instructions that only AVX-512 has: the distance to the
// nearest integer (0 for -inf), and the product with a power of two (0 for 2^-inf). The factor 2^40 is in the
// coefficients.
inline __m512 weights_as_floats(__m512 distance) {
  constexpr float kOne = 0x1p40f;
  static_assert(kWeightBits == 40);
  const __m512 t = _mm512_mul_ps(distance, _mm512_set1_ps(kLog2E));
  const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 p =
      _mm512_fmadd_ps(_mm512_set1_ps(0x1.5bba14p-10f * kOne), f, _mm512_set1_ps(0x1.3cea88p-7f * kOne));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c6b752p-5f * kOne));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebf9bcp-3f * kOne));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e42ap-1f * kOne));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kOne));
  return _mm512_scalef_ps(p, _mm512_sub_ps(t, f));
}
template <bool kScaled>
inline __m512 load_distances(const float* x, __m512 scale, __m512 x_max) {
  const __m512 value = _mm512_loadu_ps(x);
  return _mm512_sub_ps(kScaled ? _mm512_mul_ps(value, scale) : value, x_max);
}
inline __m512i as_integers(__m512 w) {  // sixteen weights as eight sums of two
  return _mm512_add_epi64(_mm512_cvttps_epi64(_mm512_castps512_ps256(w)),
                          _mm512_cvttps_epi64(_mm512_extractf32x8_ps(w, 1)));
}
inline uint64_t sum_of_lanes(__m512i narrow) {
  return static_cast<uint64_t>(
      _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_cvtepu32_epi64(_mm512_castsi512_si256(narrow)),
                                               _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(narrow, 1)))));
}

// In 32-bit lanes; kMayBeLarge: weights that these cannot hold, few in most blocks, are summed apart.
template <bool kScaled, bool kMayBeLarge>
inline uint64_t sum_of_weights(const float* x, float scale, float x_max, const char* prefetch) {
  const __m512 scales = _mm512_set1_ps(scale), maxima = _mm512_set1_ps(x_max),
               limit = _mm512_set1_ps(kNarrowLimit);
  __m512i narrow = _mm512_setzero_si512(), wide = narrow;
#pragma GCC unroll 4
  for (int i = 0; i < kBlock; i += kLanes, prefetch += 64) {
    __builtin_prefetch(prefetch, 0, 2);
    __m512 w = weights_as_floats(load_distances<kScaled>(x + i, scales, maxima));
    if constexpr (kMayBeLarge) {
      const __mmask16 large = _mm512_cmp_ps_mask(w, limit, _CMP_GE_OQ);
      if (large) [[unlikely]] {
        wide = _mm512_add_epi64(wide, as_integers(_mm512_maskz_mov_ps(large, w)));
        w = _mm512_maskz_mov_ps(_knot_mask16(large), w);
      }
    }
    narrow = _mm512_add_epi32(narrow, _mm512_cvttps_epi32(w));
  }
  return sum_of_lanes(narrow) + (kMayBeLarge ? static_cast<uint64_t>(_mm512_reduce_add_epi64(wide)) : 0);
}
inline uint64_t sum_of_weights(const float* x, float scale, float x_max, float log2_top,
                               const char* prefetch) {
  const bool large = !(log2_top < kNarrowSumBelow);
  if (scale == 1.0f)
    return large ? sum_of_weights<false, true>(x, scale, x_max, prefetch)
                 : sum_of_weights<false, false>(x, scale, x_max, prefetch);
  return large ? sum_of_weights<true, true>(x, scale, x_max, prefetch)
               : sum_of_weights<true, false>(x, scale, x_max, prefetch);
}

inline float max_and_estimate(const float* x, float scale, bool& bad, float& estimate) {
  const __m512 factor = _mm512_set1_ps(scale * kEstimateFactor), bias = _mm512_set1_ps(kEstimateBias);
  __m512 largest = _mm512_set1_ps(-kInfinity), sum = _mm512_setzero_ps();
  __mmask16 unordered = 0;
  const auto estimates = [&](__m512 v) {
    const __m512 exponent = _mm512_max_ps(_mm512_fmadd_ps(v, factor, bias), _mm512_setzero_ps());
    return _mm512_castsi512_ps(_mm512_cvtps_epi32(exponent));
  };
#pragma GCC unroll 4
  for (int i = 0; i < kBlock; i += 2 * kLanes) {
    const __m512 a = _mm512_loadu_ps(x + i), b = _mm512_loadu_ps(x + i + kLanes);
    largest = _mm512_max_ps(largest, _mm512_max_ps(a, b));
    unordered |= _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
    sum = _mm512_add_ps(sum, _mm512_add_ps(estimates(a), estimates(b)));
  }
  bad |= unordered != 0;
  estimate = _mm512_reduce_add_ps(sum);
  return _mm512_reduce_max_ps(largest);
}

inline uint64_t sum_of_weights_from(const float* x, float scale, float x_max, float least) {
  const __m512 scales = _mm512_set1_ps(scale), maxima = _mm512_set1_ps(x_max), bound = _mm512_set1_ps(least);
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < kBlock; i += kLanes) {
    const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(x + i), scales);
    const __m512 w = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(value, bound, _CMP_GE_OQ),
                                         weights_as_floats(_mm512_sub_ps(value, maxima)));
    sum = _mm512_add_epi64(sum, as_integers(w));
  }
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(sum));
}

inline int collect_tokens(const float* x, float scale, float least, float most, int32_t first_id,
                          float* values, int32_t* ids, int count) {
  const __m512 scales = _mm512_set1_ps(scale), lower = _mm512_set1_ps(least), upper = _mm512_set1_ps(most);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int i = 0; i < kBlock; i += kLanes) {
    const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(x + i), scales);
    const __mmask16 wanted =
        _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(value, lower, _CMP_GE_OQ), value, upper, _CMP_LE_OQ);
    if (!wanted) continue;  // the buffers have room for a whole vector more
    _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(wanted, value));
    _mm512_storeu_si512(ids + count, _mm512_maskz_compress_epi32(
                                         wanted, _mm512_add_epi32(_mm512_set1_epi32(first_id + i), lane)));
    count += __builtin_popcount(wanted);
  }
  return count;
}

inline int count_above(const float* x, float scale, float value) {
  const __m512 scales = _mm512_set1_ps(scale), bound = _mm512_set1_ps(value);
  int count = 0;
  for (int i = 0; i < kBlock; i += kLanes)
    count += __builtin_popcount(
        _mm512_cmp_ps_mask(_mm512_mul_ps(_mm512_loadu_ps(x + i), scales), bound, _CMP_GT_OQ));
  return count;
}

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
