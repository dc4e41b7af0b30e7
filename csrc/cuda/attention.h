// The launcher of paged attention (see csrc/common/params.h for what each field means). Pointers are the
// device's. It does not allocate, wait or read device memory, and may be captured in a CUDA graph: a replay
// finds its work in the lengths of then.
#pragma once
#include <cstddef>

#include "common/params.h"
#include "cuda/runtime.h"

namespace tokenstep::cuda {

// Memory for any call on the device; its first `zeroed` bytes are zero before the first. One call at a time
// may use it.
struct AttentionWorkspaceBytes {
  size_t total, zeroed;
};
AttentionWorkspaceBytes attention_workspace_bytes(int device_id);

void paged_attention(const AttentionParams& params, const Stream& stream);

// ---- for tests and measurements -------------------------------------------------------------------------
// Blocks, stages of a ring and slots of partial results for all launches of the process; 0: as it would be.
void force_attention_geometry(int grid, int stages, int slots);

}  // namespace tokenstep::cuda
