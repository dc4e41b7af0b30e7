// What the attention kernel's workspace holds, and the launchers of its types.
#pragma once
#include "common/params.h"
#include "cuda/attention_types.cuh"
#include "cuda/runtime.h"

namespace tokenstep::cuda {

// Counters, arrivals and uses of slots, which start zeroed; then the slots.
struct AttentionWorkspace {
  static constexpr size_t kSlotBytes =
      sizeof(float) * kTileRows * static_cast<size_t>(part_floats_per_row(kMaxHeadDim));
  static size_t zeroed_bytes(int num_slots) {
    const size_t bytes = sizeof(AttentionCounters) + 2 * sizeof(uint32_t) * static_cast<size_t>(num_slots);
    return (bytes + 255) / 256 * 256;
  }
  static size_t bytes(int num_slots) {
    return zeroed_bytes(num_slots) + kSlotBytes * static_cast<size_t>(num_slots);
  }
};

// T: the type of queries and results, C: of the caches.
template <class T, class C>
void launch_attention(AttentionKernelParams& params, const Stream& stream);

}  // namespace tokenstep::cuda
