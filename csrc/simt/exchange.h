// The core of warp-wide operations: every lane leaves a record on its own stack, the last one to come works
// out all results and writes them there.
#pragma once
#include <cstdint>
#include <source_location>

namespace tokenstep::simt {

using Where = std::source_location;

struct Operation {
  const char* name;
  bool orders_memory;
  Where where;
};

// Works out the results of all lanes in `mask` from their records, lane[0..31].
using Combine = void (*)(void* const* lane, uint32_t mask);

// Waits until every lane of `mask` has come with its record, and `combine` has run.
void exchange(uint32_t mask, void* record, Combine combine, const Operation& operation);

// Calls f(lane number, its record) for each lane of the mask.
template <class Record, class F>
void for_each_lane(void* const* records, uint32_t mask, F f) {
  for (; mask; mask &= mask - 1) {
    const int lane = __builtin_ctz(mask);
    f(static_cast<uint32_t>(lane), *static_cast<Record*>(records[lane]));
  }
}

}  // namespace tokenstep::simt
