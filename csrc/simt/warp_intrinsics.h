// CUDA's warp-wide intrinsics. Only __syncwarp() orders memory: the others exchange values and nothing more.
#pragma once
#include <concepts>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simt/exchange.h"
#include "simt/half.h"

namespace tokenstep::simt {

template <class T>
concept Shuffled = std::is_arithmetic_v<T> || std::same_as<T, __half> || std::same_as<T, __half2> ||
                   std::same_as<T, __nv_bfloat16> || std::same_as<T, __nv_bfloat162>;
template <class T>
concept Reduced = std::same_as<T, int> || std::same_as<T, unsigned>;

}  // namespace tokenstep::simt

using SimtWhere = tokenstep::simt::Where;

inline void __syncwarp(unsigned mask = ~0u, SimtWhere where = SimtWhere::current()) {
  tokenstep::simt::exchange(mask, nullptr, [](void* const*, uint32_t) {}, {"__syncwarp()", true, where});
}

// ---- shuffles: within segments of `width` lanes
// ------------------------------------------------------------------------
template <tokenstep::simt::Shuffled T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::shuffle(
      mask, value, source, width,
      [](int lane, int from, int w) { return (lane & ~(w - 1)) | (from & (w - 1)); },
      {"__shfl_sync()", false, where});
}
template <tokenstep::simt::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::shuffle(
      mask, value, static_cast<int>(delta), width,
      [](int lane, int d, int w) { return lane - d >= (lane & ~(w - 1)) ? lane - d : lane; },
      {"__shfl_up_sync()", false, where});
}
template <tokenstep::simt::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::shuffle(
      mask, value, static_cast<int>(delta), width,
      [](int lane, int d, int w) { return lane + d <= (lane | (w - 1)) ? lane + d : lane; },
      {"__shfl_down_sync()", false, where});
}
template <tokenstep::simt::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::shuffle(
      mask, value, lane_mask, width,
      [](int lane, int m, int w) { return (lane ^ m) <= (lane | (w - 1)) ? lane ^ m : lane; },
      {"__shfl_xor_sync()", false, where});
}

// ---- votes
// ------------------------------------------------------------------------------------------------------------
inline unsigned __ballot_sync(unsigned mask, int predicate, SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::fold_lanes(
      mask, predicate, 0u, [](unsigned votes, uint32_t lane, int p) { return votes | (p != 0) << lane; },
      {"__ballot_sync()", false, where});
}
inline int __any_sync(unsigned mask, int predicate, SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::fold_lanes(mask, predicate, 0,
                                     [](int any, uint32_t, int p) { return any | (p != 0); },
                                     {"__any_sync()", false, where});
}
inline int __all_sync(unsigned mask, int predicate, SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::fold_lanes(mask, predicate, 1,
                                     [](int all, uint32_t, int p) { return all & (p != 0); },
                                     {"__all_sync()", false, where});
}
template <class T>
  requires std::is_arithmetic_v<T>
unsigned __match_any_sync(unsigned mask, T value, SimtWhere where = SimtWhere::current()) {
  struct Record {
    T value;
    unsigned equal;
  } record = {value, 0};
  tokenstep::simt::exchange(
      mask, &record,
      [](void* const* records, uint32_t lanes) {
        tokenstep::simt::for_each_lane<Record>(records, lanes, [&](uint32_t, Record& mine) {
          tokenstep::simt::for_each_lane<Record>(records, lanes, [&](uint32_t lane, const Record& other) {
            if (std::memcmp(&other.value, &mine.value, sizeof(T)) == 0) mine.equal |= 1u << lane;
          });
        });
      },
      {"__match_any_sync()", false, where});
  return record.equal;
}

// ---- reductions
// ---------------------------------------------------------------------------------------------------------
template <tokenstep::simt::Reduced T>
T __reduce_add_sync(unsigned mask, T value, SimtWhere where = SimtWhere::current()) {
  return static_cast<T>(tokenstep::simt::fold_lanes(
      mask, static_cast<unsigned>(value), 0u, [](unsigned sum, uint32_t, unsigned v) { return sum + v; },
      {"__reduce_add_sync()", false, where}));
}
template <tokenstep::simt::Reduced T>
T __reduce_min_sync(unsigned mask, T value, SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::fold_lanes(mask, value, std::numeric_limits<T>::max(),
                                     [](T least, uint32_t, T v) { return v < least ? v : least; },
                                     {"__reduce_min_sync()", false, where});
}
template <tokenstep::simt::Reduced T>
T __reduce_max_sync(unsigned mask, T value, SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::fold_lanes(mask, value, std::numeric_limits<T>::lowest(),
                                     [](T most, uint32_t, T v) { return v > most ? v : most; },
                                     {"__reduce_max_sync()", false, where});
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::fold_lanes(mask, value, ~0u,
                                     [](unsigned all, uint32_t, unsigned v) { return all & v; },
                                     {"__reduce_and_sync()", false, where});
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::fold_lanes(mask, value, 0u,
                                     [](unsigned any, uint32_t, unsigned v) { return any | v; },
                                     {"__reduce_or_sync()", false, where});
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, SimtWhere where = SimtWhere::current()) {
  return tokenstep::simt::fold_lanes(mask, value, 0u,
                                     [](unsigned odd, uint32_t, unsigned v) { return odd ^ v; },
                                     {"__reduce_xor_sync()", false, where});
}
