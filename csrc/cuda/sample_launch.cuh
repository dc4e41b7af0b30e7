// Launchers of the sampler's kernels for one type of logits; each is instantiated in a file of its own.
#pragma once
#include <stdexcept>

#include "cuda/apply_logits_kernel.cuh"
#include "cuda/launch.cuh"
#include "cuda/sample_launch.h"

namespace tokenstep::cuda {

template <class Kernels, class Params>
void launch_in_groups(const char* name, const SampleParams& sizes, const Params& params, void* workspace,
                      const Stream& stream) {
  using Logit = typename Kernels::Logit;
  const SampleGeometry geometry =
      geometry_for(sizes.vocab_size, sizeof(Logit), sizes.num_rows, limits_of(stream.device_id));
  const int size = geometry.group_size;
  GroupArgs args = {size, nullptr, nullptr};
  LaunchConfig config = {name, static_cast<unsigned>(geometry.num_groups * size),
                         static_cast<unsigned>(geometry.num_threads)};
  const auto launch_as = [&]<int kThreads>() {
    switch (geometry.mode) {
      case GroupMode::kSolo:
        config.shared_bytes = shared_bytes<Logit, kThreads, GroupMode::kSolo>(sizes.vocab_size, size);
        return launch<Kernels::template kernel<kThreads, GroupMode::kSolo>>(config, stream, params, args);
      case GroupMode::kCluster:
        config.cluster = static_cast<unsigned>(size);
        config.shared_bytes = shared_bytes<Logit, kThreads, GroupMode::kCluster>(sizes.vocab_size, size);
        return launch<Kernels::template kernel<kThreads, GroupMode::kCluster>>(config, stream, params, args);
      case GroupMode::kSoft:
        if (!workspace) throw std::logic_error(std::string(name) + ": soft groups without a workspace");
        args.barriers = static_cast<SoftBarrier*>(workspace);
        args.boxes = static_cast<char*>(workspace) + SoftWorkspace::kBarriersBytes;
        config.cooperative = true;
        config.shared_bytes = shared_bytes<Logit, kThreads, GroupMode::kSoft>(sizes.vocab_size, size);
        return launch<Kernels::template kernel<kThreads, GroupMode::kSoft>>(config, stream, params, args);
    }
  };
#ifdef TOKENSTEP_SIMT
  if (geometry.num_threads == kFewerSampleThreads) return launch_as.template operator()<kFewerSampleThreads>();
  if constexpr (Kernels::kHasAllThreads)
#endif
    return launch_as.template operator()<kSampleThreads>();
  throw std::logic_error(std::string(name) + ": no kernel of so many threads");
}

template <class Logit_>
struct SampleKernels {
  using Logit = Logit_;
  static constexpr bool kHasAllThreads = sizeof(Logit) == 2;  // in the emulator
  template <int kThreads, GroupMode kMode>
  static constexpr auto kernel = sample_kernel<Logit, kThreads, kMode>;
};
template <class Logit_>
struct ApplyLogitsKernels {
  using Logit = Logit_;
  static constexpr bool kHasAllThreads = false;
  template <int kThreads, GroupMode kMode>
  static constexpr auto kernel = apply_logits_kernel<Logit, kThreads, kMode>;
};

template <class Logit>
void launch_sample(const SampleParams& params, void* workspace, const Stream& stream) {
  launch_in_groups<SampleKernels<Logit>>("sample", params, params, workspace, stream);
}
template <class Logit>
void launch_apply_logits(const ApplyLogitsParams& params, void* workspace, const Stream& stream) {
  launch_in_groups<ApplyLogitsKernels<Logit>>("apply_logits", params.sample, params, workspace, stream);
}

}  // namespace tokenstep::cuda
