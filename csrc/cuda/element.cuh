// Elements of tensors as kernels read and write them.
#pragma once
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

// Two neighbours in one word, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float x, float y);
template <>
__device__ __forceinline__ uint32_t narrow_pair<__half>(float x, float y) {
  const __half2 pair = __floats2half2_rn(x, y);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
template <>
__device__ __forceinline__ uint32_t narrow_pair<__nv_bfloat16>(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

}  // namespace tokenstep::cuda
