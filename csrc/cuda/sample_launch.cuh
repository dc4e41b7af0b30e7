// Launcher of the sampler's kernels for one type of logits; each is instantiated in a file of its own.
#pragma once
#include <stdexcept>
#include <string>

#include "cuda/launch.cuh"
#include "cuda/sample_kernel.cuh"
#include "cuda/sample_launch.h"

namespace tokenstep::cuda {

template <class Logit, int kThreads, bool kPreset>
void launch_in_groups(const SampleGeometry& geometry, LaunchConfig config, const Stream& stream,
                      const SampleKernelParams& params, const GroupArgs& args) {
  switch (geometry.mode) {
    case GroupMode::kSolo:
      config.shared_bytes = shared_bytes<Logit, kThreads, GroupMode::kSolo>(params.sample.vocab_size, 1);
      return launch<sample_kernel<Logit, kThreads, GroupMode::kSolo, kPreset>>(config, stream, params, args);
    case GroupMode::kCluster:
      config.cluster = static_cast<unsigned>(args.size);
      config.shared_bytes =
          shared_bytes<Logit, kThreads, GroupMode::kCluster>(params.sample.vocab_size, args.size);
      return launch<sample_kernel<Logit, kThreads, GroupMode::kCluster, kPreset>>(config, stream, params,
                                                                                  args);
    case GroupMode::kSoft:
      config.cooperative = true;
      config.shared_bytes =
          shared_bytes<Logit, kThreads, GroupMode::kSoft>(params.sample.vocab_size, args.size);
      return launch<sample_kernel<Logit, kThreads, GroupMode::kSoft, kPreset>>(config, stream, params, args);
  }
}

template <class Logit>
void launch_sample(const SampleKernelParams& params, void* workspace, const Stream& stream) {
  const SampleParams& p = params.sample;
  const SampleGeometry geometry =
      geometry_for(p.vocab_size, sizeof(Logit), p.num_rows, limits_of(stream.device_id));
  GroupArgs args = {geometry.group_size, nullptr, nullptr};
  if (geometry.mode == GroupMode::kSoft) {
    if (!workspace) throw std::logic_error("tokenstep: soft groups without a workspace");
    args.barriers = static_cast<SoftBarrier*>(workspace);
    args.boxes = static_cast<char*>(workspace) + SoftWorkspace::kBarriersBytes;
  }
  const LaunchConfig config = {params.out ? "apply_logits" : "sample",
                               static_cast<unsigned>(geometry.num_groups * geometry.group_size),
                               static_cast<unsigned>(geometry.num_threads)};
  const auto launch_with = [&]<bool kPreset>() {
#ifdef TOKENSTEP_SIMT
    if (geometry.num_threads == kFewerSampleThreads)
      return launch_in_groups<Logit, kFewerSampleThreads, kPreset>(geometry, config, stream, params, args);
#endif
    launch_in_groups<Logit, kSampleThreads, kPreset>(geometry, config, stream, params, args);
  };
  // Our own rules have kernels of their own, which know them when they are compiled.
  if (p.semantics == Semantics::kTokenstep)
    launch_with.template operator()<false>();
  else
    launch_with.template operator()<true>();
}

}  // namespace tokenstep::cuda
