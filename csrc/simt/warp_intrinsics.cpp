#include "simt/warp_intrinsics.h"

#include "simt/exchange.h"
#include "simt/machine.h"

namespace tokenstep::simt {
namespace {

int source_lane(Shuffle kind, int lane, int argument, int width) {
  const int first = lane & ~(width - 1), last = lane | (width - 1);
  switch (kind) {
    case Shuffle::kLane:
      return first | (argument & (width - 1));
    case Shuffle::kUp:
      return lane - argument >= first ? lane - argument : lane;
    case Shuffle::kDown:
      return lane + argument <= last ? lane + argument : lane;
    case Shuffle::kXor:
      return (lane ^ argument) <= last ? lane ^ argument : lane;
  }
  return lane;
}

const char* name_of(Shuffle kind) {
  switch (kind) {
    case Shuffle::kLane:
      return "__shfl_sync()";
    case Shuffle::kUp:
      return "__shfl_up_sync()";
    case Shuffle::kDown:
      return "__shfl_down_sync()";
    case Shuffle::kXor:
      return "__shfl_xor_sync()";
  }
  return "";
}

uint32_t apply(Reduction kind, uint32_t a, uint32_t b) {
  const auto x = static_cast<int32_t>(a), y = static_cast<int32_t>(b);
  switch (kind) {
    case Reduction::kAdd:
      return a + b;
    case Reduction::kMin:
      return a < b ? a : b;
    case Reduction::kMax:
      return a > b ? a : b;
    case Reduction::kMinSigned:
      return x < y ? a : b;
    case Reduction::kMaxSigned:
      return x > y ? a : b;
    case Reduction::kAnd:
      return a & b;
    case Reduction::kOr:
      return a | b;
    case Reduction::kXor:
      return a ^ b;
  }
  return a;
}

}  // namespace

void sync_warp(uint32_t mask, SimtWhere where) {
  exchange(mask, nullptr, [](void* const*, uint32_t) {}, {"__syncwarp()", true, where});
}

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t bits, int argument, int width, SimtWhere where) {
  struct Record {
    uint64_t bits, result;
    int source;
  } record = {bits, 0, source_lane(kind, static_cast<int>(machine.current->lane), argument, width)};
  exchange(mask, &record,
           [](void* const* records, uint32_t lanes) {
             for_each_lane<Record>(records, lanes, [&](uint32_t lane, Record& mine) {
               if (!(lanes >> mine.source & 1))
                 machine.fail("shuffle: lane %u reads lane %d, which is not in the mask 0x%08x", lane,
                              mine.source, lanes);
               mine.result = static_cast<const Record*>(records[mine.source])->bits;
             });
           },
           {name_of(kind), false, where});
  return record.result;
}

uint32_t ballot(const char* name, uint32_t mask, bool predicate, SimtWhere where) {
  struct Record {
    bool predicate;
    uint32_t votes;
  } record = {predicate, 0};
  exchange(mask, &record,
           [](void* const* records, uint32_t lanes) {
             uint32_t votes = 0;
             for_each_lane<Record>(records, lanes,
                                   [&](uint32_t lane, Record& r) { votes |= uint32_t{r.predicate} << lane; });
             for_each_lane<Record>(records, lanes, [&](uint32_t, Record& r) { r.votes = votes; });
           },
           {name, false, where});
  return record.votes;
}

uint32_t match_any(uint32_t mask, uint64_t bits, SimtWhere where) {
  struct Record {
    uint64_t bits;
    uint32_t equal;
  } record = {bits, 0};
  exchange(mask, &record,
           [](void* const* records, uint32_t lanes) {
             for_each_lane<Record>(records, lanes, [&](uint32_t, Record& mine) {
               for_each_lane<Record>(records, lanes, [&](uint32_t lane, const Record& other) {
                 if (other.bits == mine.bits) mine.equal |= 1u << lane;
               });
             });
           },
           {"__match_any_sync()", false, where});
  return record.equal;
}

uint32_t reduce(Reduction kind, uint32_t mask, uint32_t value, SimtWhere where) {
  struct Record {
    Reduction kind;
    uint32_t value;
  } record = {kind, value};
  exchange(mask, &record,
           [](void* const* records, uint32_t lanes) {
             const auto& first = *static_cast<const Record*>(records[__builtin_ctz(lanes)]);
             uint32_t result = first.value;
             for_each_lane<Record>(records, lanes & (lanes - 1),
                                   [&](uint32_t, Record& r) { result = apply(first.kind, result, r.value); });
             for_each_lane<Record>(records, lanes, [&](uint32_t, Record& r) { r.value = result; });
           },
           {"a warp reduction", false, where});
  return record.value;
}

}  // namespace tokenstep::simt
