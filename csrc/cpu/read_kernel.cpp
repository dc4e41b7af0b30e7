#include "cpu/read.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {

// 128 lanes: eight independent vectors of the widest set, so that loads and not the maximum's latency set the
// pace.
int32_t read_max(const int32_t* data, int64_t count) {
  constexpr int kLanes = 128;
  int32_t lane[kLanes];
  for (int j = 0; j < kLanes; ++j) lane[j] = INT32_MIN;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] = lane[j] > data[i + j] ? lane[j] : data[i + j];
  int32_t best = INT32_MIN;
  for (; i < count; ++i) best = best > data[i] ? best : data[i];
  for (int j = 0; j < kLanes; ++j) best = best > lane[j] ? best : lane[j];
  return best;
}

}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
