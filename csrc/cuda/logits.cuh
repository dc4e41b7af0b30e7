// Rows of logits as kernels read them: units of 16 bytes, whose maxima are taken two tokens at a time.
#pragma once
#include "common/sampling_rules.h"
#include "cuda/warp.cuh"

namespace tokenstep::cuda {

constexpr int kUnitBytes = 16, kUnitWords = 4;
template <class Logit>
constexpr int kUnitTokens = kUnitBytes / sizeof(Logit);
template <class Logit>
constexpr int kWordTokens = 4 / sizeof(Logit);

struct Unit {
  uint32_t word[kUnitWords];
};

// ---- one word of a unit: two 16-bit tokens, the first in the low half, or one float ---------------------
template <class Logit>
constexpr uint32_t kMinusInfinityWord = 0xff800000u;
template <>
constexpr uint32_t kMinusInfinityWord<__half> = 0xfc00fc00u;
template <>
constexpr uint32_t kMinusInfinityWord<__nv_bfloat16> = 0xff80ff80u;

template <class Logit>
__device__ __forceinline__ float token_of_word(uint32_t word, int i);
template <>
__device__ __forceinline__ float token_of_word<float>(uint32_t word, int) {
  return __uint_as_float(word);
}
template <>
__device__ __forceinline__ float token_of_word<__half>(uint32_t word, int i) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(i ? word >> 16 : word)));
}
template <>
__device__ __forceinline__ float token_of_word<__nv_bfloat16>(uint32_t word, int i) {
  return __uint_as_float(i ? word & 0xffff0000u : word << 16);
}

// The larger of each token, NaN if either is.
template <class Logit>
__device__ __forceinline__ uint32_t max_of_words(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t max_of_words<float>(uint32_t a, uint32_t b) {
  return __float_as_uint(max_nan(__uint_as_float(a), __uint_as_float(b)));
}
template <class Pair>
__device__ __forceinline__ uint32_t max_of_pairs(uint32_t a, uint32_t b) {
  Pair x, y;
  memcpy(&x, &a, sizeof x);
  memcpy(&y, &b, sizeof y);
  x = __hmax2_nan(x, y);
  memcpy(&a, &x, sizeof a);
  return a;
}
template <>
__device__ __forceinline__ uint32_t max_of_words<__half>(uint32_t a, uint32_t b) {
  return max_of_pairs<__half2>(a, b);
}
template <>
__device__ __forceinline__ uint32_t max_of_words<__nv_bfloat16>(uint32_t a, uint32_t b) {
  return max_of_pairs<__nv_bfloat162>(a, b);
}

// ---- units ----------------------------------------------------------------------------------------------
template <class Logit>
__device__ __forceinline__ float max_of_word(uint32_t word) {
  if constexpr (kWordTokens<Logit> == 1) return __uint_as_float(word);
  return max_nan(token_of_word<Logit>(word, 0), token_of_word<Logit>(word, 1));
}
template <class Logit>
__device__ __forceinline__ uint32_t word_max(const Unit& unit) {
  return max_of_words<Logit>(max_of_words<Logit>(unit.word[0], unit.word[1]),
                             max_of_words<Logit>(unit.word[2], unit.word[3]));
}

// Tokens that `bits` does not name become -inf in one word of a unit.
template <class Logit>
__device__ __forceinline__ uint32_t mask_word(uint32_t word, uint32_t bits) {
  const uint32_t keep =
      kWordTokens<Logit> == 2 ? (bits & 1) * 0xffffu | (bits & 2) * 0x7fff8000u : 0u - (bits & 1);
  return (word & keep) | (kMinusInfinityWord<Logit> & ~keep);
}

// f(value, place) for the tokens of a unit, one word at a time: a rolled loop, for the sake of small code.
template <class Logit, class F>
__device__ __forceinline__ void for_each_token(Unit unit, F f) {
#pragma unroll 1
  for (int w = 0; w < kUnitWords; ++w) {
#pragma unroll
    for (int i = 0; i < kWordTokens<Logit>; ++i)
      f(token_of_word<Logit>(unit.word[0], i), w * kWordTokens<Logit> + i);
    unit.word[0] = unit.word[1];
    unit.word[1] = unit.word[2];
    unit.word[2] = unit.word[3];
  }
}

template <class Logit>
__device__ __forceinline__ float to_float(Logit x) {
  if constexpr (sizeof(Logit) == sizeof(float)) {
    return x;
  } else {
    unsigned short bits;
    memcpy(&bits, &x, sizeof bits);
    return token_of_word<Logit>(bits, 0);
  }
}

}  // namespace tokenstep::cuda
