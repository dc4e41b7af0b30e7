// Block kernels as plain loops (see sample_blocks.h), sixteen lanes at a time.
#pragma once

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

constexpr int kLanes = 16;

// Largest value of a block; `bad` becomes true if one is NaN.
inline float max_of_block(const float* x, bool& bad) {
  int32_t largest = INT32_MIN, least = INT32_MAX;
  for (int i = 0; i < kBlock; ++i) {
    const int32_t value = ordered_int(static_cast<int32_t>(bits_of(x[i])));
    largest = largest > value ? largest : value;
    least = least < value ? least : value;
  }
  bad |= largest > 0x7f800000 || least < -0x7f800001;
  return float_from_bits(static_cast<uint32_t>(ordered_int(largest)));
}

// Steps 1 on a block: out is x where its bit is set, -inf elsewhere. out may be x.
inline void mask_block(const float* x, const uint32_t* words, float* out) {
  for (int word = 0; word < kMaskWords; ++word)
    for (int bit = 0; bit < 32; ++bit)
      out[word * 32 + bit] = words[word] >> bit & 1 ? x[word * 32 + bit] : -kInfinity;
}

// Largest allowed value of a block without NaN.
inline float max_of_allowed(const float* x, const uint32_t* words) {
  alignas(64) float masked[kBlock];
  bool ignored = false;
  mask_block(x, words, masked);
  return max_of_block(masked, ignored);
}

// Sum of the weights of a block whose largest is 2^(40 + log2_top). Meanwhile `prefetch` is fetched, kBlock *
// 4 bytes, evenly spread: in a burst it would take all line-fill buffers and stall this block's own loads.
inline uint64_t sum_of_weights(const float* x, float scale, float x_max, float log2_top,
                               const char* prefetch) {
  uint64_t sum = 0;
  if (log2_top < kNarrowSumBelow) {  // 32-bit lanes suffice
    uint32_t lane[kLanes] = {};
    for (int i = 0; i < kBlock; i += kLanes, prefetch += 64) {
      __builtin_prefetch(prefetch, 0, 2);
      for (int j = 0; j < kLanes; ++j)
        lane[j] += static_cast<uint32_t>(static_cast<int32_t>(weight_of(x[i + j], scale, x_max)));
    }
    for (const uint32_t part : lane) sum += part;
    return sum;
  }
  uint32_t high[kLanes] = {}, low[kLanes] = {};  // weight = high * 2^20 + low: no 64-bit conversions
  for (int i = 0; i < kBlock; i += kLanes, prefetch += 64) {
    __builtin_prefetch(prefetch, 0, 2);
    for (int j = 0; j < kLanes; ++j) {
      const float w = weight_of(x[i + j], scale, x_max);
      const int32_t upper = static_cast<int32_t>(mul(w, 0x1p-20f));
      high[j] += static_cast<uint32_t>(upper);
      low[j] += static_cast<uint32_t>(static_cast<int32_t>(fma(static_cast<float>(upper), -0x1p20f, w)));
    }
  }
  for (int j = 0; j < kLanes; ++j) sum += (static_cast<uint64_t>(high[j]) << 20) + low[j];
  return sum;
}

// Sum of the weights of the tokens with x * scale >= least.
inline uint64_t sum_of_weights_from(const float* x, float scale, float x_max, float least) {
  uint32_t high[kLanes] = {}, low[kLanes] = {};
  for (int i = 0; i < kBlock; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const float value = mul(x[i + j], scale), w = weight_as_float(sub(value, x_max));
      const int32_t upper = static_cast<int32_t>(mul(w, 0x1p-20f));
      const int32_t lower = static_cast<int32_t>(fma(static_cast<float>(upper), -0x1p20f, w));
      const int32_t counts = -static_cast<int32_t>(value >= least);
      high[j] += static_cast<uint32_t>(upper & counts);
      low[j] += static_cast<uint32_t>(lower & counts);
    }
  uint64_t sum = 0;
  for (int j = 0; j < kLanes; ++j) sum += (static_cast<uint64_t>(high[j]) << 20) + low[j];
  return sum;
}

// Appends the tokens with least <= x * scale <= most, ids ascending; returns the new count. Most groups have
// none.
inline int collect_tokens(const float* x, float scale, float least, float most, int32_t first_id,
                          float* values, int32_t* ids, int count) {
  for (int i = 0; i < kBlock; i += kLanes) {
    int any = 0;
    for (int j = 0; j < kLanes; ++j) {
      const float value = mul(x[i + j], scale);
      any |= static_cast<int>(value >= least) & static_cast<int>(value <= most);
    }
    if (!any) continue;
    for (int j = 0; j < kLanes; ++j) {
      const float value = mul(x[i + j], scale);
      values[count] = value;
      ids[count] = first_id + i + j;
      count += static_cast<int>(value >= least) & static_cast<int>(value <= most);
    }
  }
  return count;
}

// How many tokens have x * scale > value.
inline int count_above(const float* x, float scale, float value) {
  int count = 0;
  for (int i = 0; i < kBlock; ++i) count += mul(x[i], scale) > value;
  return count;
}

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
