#include <string>

#include "common/check.h"
#include "cuda/launch.cuh"
#include "cuda/sample.h"
#include "cuda/sample_launch.h"
#include "cuda/slots.cuh"

namespace tokenstep::cuda {
namespace {

void launch(const ApplyLogitsParams& params, void* workspace, const Stream& stream) {
  switch (params.sample.logits_dtype) {
    case DType::kFloat16:
      return launch_sample<__half>(params, workspace, stream);
    case DType::kBFloat16:
      return launch_sample<__nv_bfloat16>(params, workspace, stream);
    default:
      return launch_sample<float>(params, workspace, stream);
  }
}

}  // namespace

void force_sample_geometry(const char* mode, int group_size, int num_threads) {
  const std::string name = mode;
  if (name == "auto") return forced_geometry.reset();
  for (const GroupMode of : {GroupMode::kSolo, GroupMode::kCluster, GroupMode::kSoft}) {
    if (name != name_of(of)) continue;
    const int largest = of == GroupMode::kSolo ? 1 : kMaxGroupSize;
    if (group_size < 1 || group_size > largest) break;
    if (num_threads != kSampleThreads && num_threads != kDefaultSampleThreads) break;
    forced_geometry = ForcedGeometry{of, group_size, num_threads};
    return;
  }
  raise<ValueError>("testing.force_sample_geometry",
                    "mode = '%s' with %d blocks of %d threads, expected 'auto', "
                    "'solo' with 1 block, or 'cluster' or 'soft' with 1 to %d of %d threads",
                    mode, group_size, num_threads, kMaxGroupSize, kSampleThreads);
}

SampleGeometryInfo sample_geometry(int vocab_size, int bytes_per_logit, int num_rows, int device_id) {
  const SampleGeometry geometry = geometry_for(vocab_size, bytes_per_logit, num_rows, limits_of(device_id));
  return {name_of(geometry.mode), geometry.group_size, geometry.num_groups};
}

size_t sample_workspace_bytes(int num_rows, int vocab_size, int device_id) {
  const DeviceLimits& limits = limits_of(device_id);
  int num_blocks = 0;
  for (int rows = 1; rows <= num_rows; rows *= 2) {  // fewer rows may be split further
    const SampleGeometry geometry = geometry_for(vocab_size, sizeof(float), rows, limits);
    if (geometry.mode == GroupMode::kSoft) num_blocks = std::max(num_blocks, limits.num_multiprocessors);
  }
  return num_blocks > 0 ? SoftWorkspace::bytes(num_blocks) : 0;
}

void sample(const SampleParams& params, void* workspace, const Stream& stream) {
  launch({params, nullptr, 0}, workspace, stream);
}
void apply_logits(const ApplyLogitsParams& params, void* workspace, const Stream& stream) {
  launch(params, workspace, stream);
}

__global__ void empty_kernel() {}
void launch_empty(const Stream& stream) { launch<empty_kernel>({"empty", 1, 32}, stream); }

void update_slot(const SlotUpdate& update, const Stream& stream) {
  launch<update_slot_kernel>({"update_slot", 1, kSlotThreads}, stream, update);
}

void set_row_fields(const RowFieldsParams& params, const Stream& stream) {
  const int blocks = (params.num_rows + kFieldThreads - 1) / kFieldThreads;
  launch<set_row_fields_kernel>({"set_row_fields", static_cast<unsigned>(blocks), kFieldThreads}, stream,
                                params);
}

}  // namespace tokenstep::cuda
