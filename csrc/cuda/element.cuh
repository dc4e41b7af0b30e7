// Elements of tensors as kernels read and write them.
#pragma once
#include <cstring>
#include <type_traits>

#include "common/quantised.h"
#include "cuda/ptx.cuh"

namespace tokenstep::cuda {

struct Float8 {  // e4m3
  uint8_t code;
};
struct Int8 {
  int8_t code;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// To the nearest, ties to even.
template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <>
__device__ __forceinline__ Float8 narrow<Float8>(float x) {
  return {e4m3_from_float(x)};
}
template <>
__device__ __forceinline__ Int8 narrow<Int8>(float x) {
  return {int8_from_float(x)};
}

// As float_from_e4m3, in fewer instructions: float32's exponent is 127 - 7 powers of two further, and a GPU
// multiplies subnormal numbers at no cost.
__device__ __forceinline__ float widen(Float8 x) {
  const uint32_t magnitude = x.code & 0x7fu, sign = (x.code & 0x80u) << 24;
  return magnitude == 0x7fu ? float_from_bits(0x7fc00000u | sign)
                            : mul(float_from_bits(sign | magnitude << 20), 0x1p120f);
}
__device__ __forceinline__ float widen(Int8 x) { return float_from_int8(x.code); }

// ---- two neighbours in one word, the first in the low half ------------------------------------------------
template <class T>
using PairOf = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <class Pair>
__device__ __forceinline__ uint32_t word_of(Pair pair) {
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
template <class T>
__device__ __forceinline__ PairOf<T> pair_of(uint32_t word) {
  PairOf<T> pair;
  memcpy(&pair, &word, sizeof pair);
  return pair;
}

template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float x, float y);
template <>
__device__ __forceinline__ uint32_t narrow_pair<__half>(float x, float y) {
  return word_of(__floats2half2_rn(x, y));
}
template <>
__device__ __forceinline__ uint32_t narrow_pair<__nv_bfloat16>(float x, float y) {
  return word_of(__floats2bfloat162_rn(x, y));
}

}  // namespace tokenstep::cuda
