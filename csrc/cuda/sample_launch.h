// What the launchers of all logit types share.
#pragma once
#include "common/params.h"
#include "cuda/sample_geometry.h"

namespace tokenstep::cuda {

// Of soft groups: barriers, which start zeroed, then boxes.
struct SoftWorkspace {
  static constexpr size_t kBarriersBytes = 4096;
  static size_t bytes(int num_blocks) { return kBarriersBytes + sizeof(Box<kSampleThreads>) * num_blocks; }
  static_assert(kBarriersBytes >= sizeof(SoftBarrier) * 256);
};

template <class Logit>
void launch_sample(const SampleParams& params, void* workspace, const Stream& stream);
template <class Logit>
void launch_apply_logits(const ApplyLogitsParams& params, void* workspace, const Stream& stream);

}  // namespace tokenstep::cuda
