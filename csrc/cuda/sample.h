// The sampler's launchers (see csrc/common/params.h for what each field means). Pointers are the device's.
// None allocates, waits or reads device memory: all can be captured in a CUDA graph.
#pragma once
#include <cstddef>

#include "common/params.h"
#include "cuda/runtime.h"

namespace tokenstep::cuda {

// Memory for launches of up to so many rows, zeroed before the first; one launch at a time may use it.
size_t sample_workspace_bytes(int num_rows, int vocab_size, int device_id);

void sample(const SampleParams& params, void* workspace, const Stream& stream);             // steps 0-10
void apply_logits(const ApplyLogitsParams& params, void* workspace, const Stream& stream);  // steps 0-8
void update_slot(const SlotUpdate& update, const Stream& stream);
void set_row_fields(const RowFieldsParams& params, const Stream& stream);

// ---- for tests and measurements -------------------------------------------------------------------------
// Another choice of blocks per row, for all launches of the process: mode "solo", "cluster", "soft" or
// "auto".
void force_sample_geometry(const char* mode, int group_size, int num_threads);
struct SampleGeometryInfo {
  const char* mode;
  int group_size, num_groups;
};
SampleGeometryInfo sample_geometry(int vocab_size, int bytes_per_logit, int num_rows, int device_id);
void launch_empty(const Stream& stream);  // what any launch costs

}  // namespace tokenstep::cuda
