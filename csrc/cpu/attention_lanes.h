// Scores as eight partial sums: lane i of eight adds the products of dimensions i, i + 8, i + 16, ..., and
// the eight are then added in halves. Keys need not be transposed for that, and the chains are short, which
// keeps the rounding error of float32 small. A vector holds the partial sums of two tokens, of one, or of
// half a token; those of kLanes tokens are kGroupVectors vectors and become one vector of scores. For
// *_kernel.cpp files alone.
#pragma once
#include "cpu/vec.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

constexpr int kPartials = 8;
constexpr int kGroupVectors = kPartials;
constexpr int kVectorsPerToken = kLanes < kPartials ? kPartials / kLanes : 1;

constexpr int tokens_of(int vectors) { return vectors * kLanes / kPartials; }

// Of 16 lanes, vector i holds tokens first_token(i) and kSecondToken more: add_partials then needs no last
// step to put them in order.
constexpr int kSecondToken = 4;
constexpr int first_token(int vector) {
  return kLanes == 16 ? vector / 4 * 8 + vector % 4 : vector / kVectorsPerToken;
}

#if defined(__AVX512F__)
TOKENSTEP_VEC Floats load_two(const float* first, const float* second) {
  return reinterpret_cast<Floats>(
      _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(first)), _mm256_loadu_ps(second), 1));
}
template <class T>
TOKENSTEP_VEC Floats load_two(const T* first, const T* second) {
  const auto* a = reinterpret_cast<const __m128i*>(first);
  const auto* b = reinterpret_cast<const __m128i*>(second);
  if constexpr (sizeof(T) == 1) {
    return widen_lanes(_mm_unpacklo_epi64(_mm_loadl_epi64(a), _mm_loadl_epi64(b)), T{});
  } else {
    const __m256i low = _mm256_castsi128_si256(_mm_loadu_si128(a));
    return widen_lanes(_mm256_inserti128_si256(low, _mm_loadu_si128(b), 1), T{});
  }
}
#endif

// What dimensions d ... d + 7 of a group's tokens have in this vector.
template <class T>
TOKENSTEP_VEC Floats load_keys(const T* const* tokens, int vector, int d) {
  const T* const* first = tokens + first_token(vector);
#if defined(__AVX512F__)
  return load_two(first[0] + d, first[kSecondToken] + d);
#else
  return load(first[0] + d + vector % kVectorsPerToken * kLanes);
#endif
}

// The same dimensions of a query, for this vector.
TOKENSTEP_VEC Floats load_query(const float* query, [[maybe_unused]] int vector, int d) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_broadcast_f32x8(_mm256_loadu_ps(query + d)));
#else
  return load(query + d + vector % kVectorsPerToken * kLanes);
#endif
}

// The scores of a group's tokens, in order: ((x0 + x4) + (x2 + x6)) + ((x1 + x5) + (x3 + x7)) of each one's
// partial sums x. Halves of a token are added first, then tokens are brought together.
TOKENSTEP_VEC Floats add_partials(const Floats (&sum)[kGroupVectors]) {
  Floats half[4];  // four sums of each token
#if defined(__AVX512F__)
  for (int i = 0; i < 4; ++i) {
    const __m512 a = reinterpret_cast<__m512>(sum[i]), b = reinterpret_cast<__m512>(sum[i + 4]);
    half[i] = reinterpret_cast<Floats>(
        _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)));
  }
#elif defined(__AVX2__)
  for (int i = 0; i < 4; ++i) {
    const __m256 a = reinterpret_cast<__m256>(sum[i]), b = reinterpret_cast<__m256>(sum[i + 4]);
    half[i] = reinterpret_cast<Floats>(
        _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)));
  }
#else
  for (int i = 0; i < 4; ++i) half[i] = sum[2 * i] + sum[2 * i + 1];
#endif
  Floats quarter[2];
  for (int i = 0; i < 2; ++i)
    quarter[i] = shuffle_fours<0, 1, 0, 1>(half[2 * i], half[2 * i + 1]) +
                 shuffle_fours<2, 3, 2, 3>(half[2 * i], half[2 * i + 1]);
  return shuffle_fours<0, 2, 0, 2>(quarter[0], quarter[1]) +
         shuffle_fours<1, 3, 1, 3>(quarter[0], quarter[1]);
}

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
