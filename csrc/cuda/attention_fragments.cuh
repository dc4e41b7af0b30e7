// Keys and values from rows in shared memory to the fragments that mma takes: as they are, or widened from
// codes of one byte (common/quantised.h) on their way into registers.
//
// ldmatrix moves units of 16 bits, which of codes are two dimensions of one token. A lane gets one word of
// four codes: of a key the dimensions 4 * t ... 4 * t + 3 of its token, t = lane % 4; of values, transposed,
// two dimensions of two tokens. Even codes (bytes 0 and 2) and odd ones (1 and 3) are widened to a pair each
// without being moved, so that position p of 16 is dimension 2 * (p % 8) + p / 8 of them. Queries are laid
// down in that order, and outputs come out in it; a sum over dimensions does not mind.
#pragma once
#include "cuda/attention_types.cuh"
#include "cuda/element.cuh"

namespace tokenstep::cuda {

// ---- codes ------------------------------------------------------------------------------------------------
// `even`: codes 0 and 2 of the word as a pair of T, the first in the low half; `odd`: 1 and 3. Exact.
struct CodePairs {
  uint32_t even, odd;
};

template <class T>
__device__ __forceinline__ uint32_t times(uint32_t pair, uint32_t factor) {
  return word_of(__hmul2(pair_of<T>(pair), pair_of<T>(factor)));
}
template <class T>
__device__ __forceinline__ uint32_t minus(uint32_t pair, uint32_t other) {
  return word_of(__hsub2(pair_of<T>(pair), pair_of<T>(other)));
}

// e4m3 without its NaN (which becomes 480): the code's bits are those of a wider type with a smaller
// exponent, 15 - 7 or 127 - 7 powers of two away.
__device__ __forceinline__ CodePairs widen_codes(__half, Float8, uint32_t word) {
  const auto widened = [](uint32_t high_bytes) {
    const uint32_t bits = (high_bytes & 0x80008000u) | (high_bytes >> 1 & 0x3f803f80u);
    return times<__half>(bits, 0x5c005c00u);  // 2^8
  };
  return {widened(word << 8), widened(word)};
}
__device__ __forceinline__ CodePairs widen_codes(__nv_bfloat16, Float8, uint32_t word) {
  const auto widened = [](uint32_t high_bytes) {
    const uint32_t bits = (high_bytes & 0x80008000u) | (high_bytes >> 4 & 0x07f007f0u);
    return times<__nv_bfloat16>(bits, 0x7b807b80u);  // 2^120
  };
  return {widened(word << 8), widened(word)};
}
// int8 as the last bits of 1024 + (x + 128).
__device__ __forceinline__ CodePairs widen_codes(__half, Int8, uint32_t word) {
  const auto widened = [](uint32_t low_bytes) {
    return minus<__half>((low_bytes & 0x00ff00ffu) ^ 0x64806480u, 0x64806480u);
  };
  return {widened(word), widened(word >> 8)};
}
// Eight bits are one more than bfloat16 has behind its first: 128 + x % 128, less 128 or, of a negative x,
// 256.
__device__ __forceinline__ CodePairs widen_codes(__nv_bfloat16, Int8, uint32_t word) {
  const auto widened = [](uint32_t low_bytes) {
    return minus<__nv_bfloat16>((low_bytes & 0x007f007fu) | 0x43004300u,
                                (low_bytes & 0x00800080u) | 0x43004300u);
  };
  return {widened(word), widened(word >> 8)};
}

// The highest bits of the bytes that are NaN.
template <class C>
__device__ __forceinline__ uint32_t nan_codes(uint32_t word) {
  if constexpr (std::is_same_v<C, Int8>)
    return 0;
  else
    return ((word & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
}
__device__ __forceinline__ void make_nan(uint32_t nan_codes, CodePairs& pairs) {
  pairs.even |= (nan_codes & 0x00800080u) * 0xffu;  // 0x7f80, with the bits of 480 NaN of both types
  pairs.odd |= (nan_codes >> 8 & 0x00800080u) * 0xffu;
}

template <class T, class C>
__device__ __forceinline__ void widen_codes(const uint32_t (&words)[2], CodePairs (&pairs)[2]) {
  for (int i = 0; i < 2; ++i) pairs[i] = widen_codes(T{}, C{}, words[i]);
  const uint32_t nans[2] = {nan_codes<C>(words[0]), nan_codes<C>(words[1])};
  if (nans[0] | nans[1])
    for (int i = 0; i < 2; ++i) make_nan(nans[i], pairs[i]);
}

// Whether some element of a word is an infinity or NaN.
template <class T>
__device__ __forceinline__ bool has_non_finite(uint32_t word) {
  return nan_codes<T>(word);
}
template <>
__device__ __forceinline__ bool has_non_finite<__half>(uint32_t word) {
  return (word & 0x7c00u) == 0x7c00u || (word & 0x7c000000u) == 0x7c000000u;
}
template <>
__device__ __forceinline__ bool has_non_finite<__nv_bfloat16>(uint32_t word) {
  return (word & 0x7f80u) == 0x7f80u || (word & 0x7f800000u) == 0x7f800000u;
}

// ---- fragments --------------------------------------------------------------------------------------------
// Of 16 tokens and the 16 dimensions of `step`: for mma's B, as {key[2 * n], key[2 * n + 1]} of tokens 8 * n
// ..., {value[2 * n], value[2 * n + 1]} of positions 8 * n ....
template <class T, class C, int kHeadDim>
struct Fragments {
  using Rows = SharedRows<C, kHeadDim>;

  static __device__ __forceinline__ constexpr int dimension(int position) {
    return position / 16 * 16 + position % 8 * 2 + position % 16 / 8;
  }

  __device__ __forceinline__ static void load_key(const char* keys, int step, int lane, uint32_t (&key)[4]) {
    uint32_t words[2];
    load_matrix_x2(words, Rows::piece(keys, lane % 16, step));
    CodePairs pairs[2];
    widen_codes<T, C>(words, pairs);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      key[2 * n] = pairs[n].even;
      key[2 * n + 1] = pairs[n].odd;
    }
  }
  __device__ __forceinline__ static void load_value(const char* values, int step, int lane,
                                                    uint32_t (&value)[4]) {
    uint32_t words[2];
    load_matrix_x2_transposed(words, Rows::piece(values, lane % 16, step));
    CodePairs pairs[2];
    widen_codes<T, C>(words, pairs);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      value[half] = pairs[half].even;
      value[2 + half] = pairs[half].odd;
    }
  }
  // Of the lane's row r: the outputs of both its positions of `step` and the next eight are four neighbours.
  __device__ __forceinline__ static void store_outputs(const float (&low)[4], const float (&high)[4], int r,
                                                       int lane, float* step_outputs) {
    *reinterpret_cast<float4*>(step_outputs + lane % 4 * 4) =
        make_float4(low[2 * r], high[2 * r], low[2 * r + 1], high[2 * r + 1]);
  }
};

template <class T, int kHeadDim>
struct Fragments<T, T, kHeadDim> {
  using Rows = SharedRows<T, kHeadDim>;

  static __device__ __forceinline__ constexpr int dimension(int position) { return position; }

  __device__ __forceinline__ static void load_key(const char* keys, int step, int lane, uint32_t (&key)[4]) {
    load_matrix_x4(key, Rows::piece(keys, lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
  }
  __device__ __forceinline__ static void load_value(const char* values, int step, int lane,
                                                    uint32_t (&value)[4]) {
    load_matrix_x4_transposed(value, Rows::piece(values, lane % 16, 2 * step + lane / 16));
  }
  __device__ __forceinline__ static void store_outputs(const float (&low)[4], const float (&high)[4], int r,
                                                       int lane, float* step_outputs) {
    float* const out = step_outputs + lane % 4 * 2;
    *reinterpret_cast<float2*>(out) = make_float2(low[2 * r], low[2 * r + 1]);
    *reinterpret_cast<float2*>(out + 8) = make_float2(high[2 * r], high[2 * r + 1]);
  }
};

// float32 is multiplied without tensor cores; its outputs lie as mma would leave them.
template <class C, int kHeadDim>
struct Fragments<float, C, kHeadDim> : Fragments<__half, __half, kHeadDim> {};
template <int kHeadDim>
struct Fragments<float, float, kHeadDim> : Fragments<__half, __half, kHeadDim> {};

}  // namespace tokenstep::cuda
