// CUDA's warp-wide intrinsics. Only __syncwarp() orders memory: the others exchange values and nothing more.
#pragma once
#include <concepts>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "simt/half.h"

using SimtWhere = std::source_location;

namespace tokenstep::simt {

enum class Shuffle { kLane, kUp, kDown, kXor };
enum class Reduction { kAdd, kMin, kMax, kMinSigned, kMaxSigned, kAnd, kOr, kXor };

void sync_warp(uint32_t mask, SimtWhere where);
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t bits, int argument, int width, SimtWhere where);
uint32_t ballot(const char* name, uint32_t mask, bool predicate, SimtWhere where);
uint32_t match_any(uint32_t mask, uint64_t bits, SimtWhere where);
uint32_t reduce(Reduction kind, uint32_t mask, uint32_t value, SimtWhere where);

template <class T>
concept Shuffled =
    sizeof(T) <= 8 && (std::is_arithmetic_v<T> || std::same_as<T, __half> || std::same_as<T, __half2> ||
                       std::same_as<T, __nv_bfloat16> || std::same_as<T, __nv_bfloat162>);

template <class T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace tokenstep::simt

inline void __syncwarp(unsigned mask = ~0u, SimtWhere where = SimtWhere::current()) {
  tokenstep::simt::sync_warp(mask, where);
}

// ---- shuffles: within segments of `width` lanes -----------------------------------------------------------
#define TOKENSTEP_SIMT_SHUFFLE(name, kind, Argument)                                                    \
  template <tokenstep::simt::Shuffled T>                                                                \
  T name(unsigned mask, T value, Argument argument, int width = 32,                                     \
         SimtWhere where = SimtWhere::current()) {                                                      \
    return tokenstep::simt::from_bits<T>(                                                               \
        tokenstep::simt::shuffle(tokenstep::simt::Shuffle::kind, mask, tokenstep::simt::to_bits(value), \
                                 static_cast<int>(argument), width, where));                            \
  }
TOKENSTEP_SIMT_SHUFFLE(__shfl_sync, kLane, int)
TOKENSTEP_SIMT_SHUFFLE(__shfl_up_sync, kUp, unsigned)
TOKENSTEP_SIMT_SHUFFLE(__shfl_down_sync, kDown, unsigned)
TOKENSTEP_SIMT_SHUFFLE(__shfl_xor_sync, kXor, int)
#undef TOKENSTEP_SIMT_SHUFFLE

// ---- votes ------------------------------------------------------------------------------------------------
inline unsigned __ballot_sync(unsigned mask, int predicate, SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::ballot("__ballot_sync()", mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::ballot("__any_sync()", mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::ballot("__all_sync()", mask, predicate == 0, where) == 0;
}
template <class T>
  requires std::is_arithmetic_v<T>
unsigned __match_any_sync(unsigned mask, T value, SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::match_any(mask, tokenstep::simt::to_bits(value), where);
}

// ---- reductions: sm_80 and later --------------------------------------------------------------------------
#define TOKENSTEP_SIMT_REDUCE(name, T, kind)                                              \
  inline T name(unsigned mask, T value, SimtWhere where = SimtWhere::current()) {         \
    return static_cast<T>(tokenstep::simt::reduce(tokenstep::simt::Reduction::kind, mask, \
                                                  static_cast<uint32_t>(value), where));  \
  }
TOKENSTEP_SIMT_REDUCE(__reduce_add_sync, int, kAdd)
TOKENSTEP_SIMT_REDUCE(__reduce_add_sync, unsigned, kAdd)
TOKENSTEP_SIMT_REDUCE(__reduce_min_sync, int, kMinSigned)
TOKENSTEP_SIMT_REDUCE(__reduce_min_sync, unsigned, kMin)
TOKENSTEP_SIMT_REDUCE(__reduce_max_sync, int, kMaxSigned)
TOKENSTEP_SIMT_REDUCE(__reduce_max_sync, unsigned, kMax)
TOKENSTEP_SIMT_REDUCE(__reduce_and_sync, unsigned, kAnd)
TOKENSTEP_SIMT_REDUCE(__reduce_or_sync, unsigned, kOr)
TOKENSTEP_SIMT_REDUCE(__reduce_xor_sync, unsigned, kXor)
#undef TOKENSTEP_SIMT_REDUCE
