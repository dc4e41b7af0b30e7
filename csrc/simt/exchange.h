// The core of warp-wide operations.
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

// Works out the results of all lanes in `mask` from their records, lane[0..31], and writes them there.
using Combine = void (*)(void* const* lane, uint32_t mask);

// Waits until every lane of `mask` has come with its record, and `combine` has run.
void exchange(uint32_t mask, void* record, Combine combine, const Operation& operation);

[[noreturn]] void fail_shuffle(uint32_t lane, uint32_t source, uint32_t mask);

// Calls f(lane number, its record) for each lane of the mask.
template <class Record, class F>
void for_each_lane(void* const* records, uint32_t mask, F f) {
  for (uint32_t lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) f(lane, *static_cast<Record*>(records[lane]));
}

// One value in, the same result out for all: votes and reductions. next = fold(result so far, lane, value of
// that lane).
template <class Out, class In, class Fold>
Out fold_lanes(uint32_t mask, In value, Out start, Fold, const Operation& operation) {
  struct Record {
    In value;
    Out result;
  } record = {value, start};
  exchange(
      mask, &record,
      [](void* const* records, uint32_t lanes) {
        Out result = static_cast<Record*>(records[__builtin_ctz(lanes)])->result;
        for_each_lane<Record>(records, lanes,
                              [&](uint32_t lane, Record& r) { result = Fold()(result, lane, r.value); });
        for_each_lane<Record>(records, lanes, [&](uint32_t, Record& r) { r.result = result; });
      },
      operation);
  return record.result;
}

// Every lane reads the value of lane source(own lane, argument).
template <class T, class Source>
T shuffle(uint32_t mask, T value, int argument, int width, Source, const Operation& operation) {
  struct Record {
    T value, result;
    int argument, width;
  } record = {value, T(), argument, width};
  exchange(
      mask, &record,
      [](void* const* records, uint32_t lanes) {
        for_each_lane<Record>(records, lanes, [&](uint32_t lane, Record& r) {
          const int source = Source()(static_cast<int>(lane), r.argument, r.width);
          if (!(lanes >> source & 1)) fail_shuffle(lane, static_cast<uint32_t>(source), lanes);
          r.result = static_cast<Record*>(records[source])->value;
        });
      },
      operation);
  return record.result;
}

}  // namespace tokenstep::simt
