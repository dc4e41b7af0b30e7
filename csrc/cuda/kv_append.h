// The launchers of append_kv and merge_attention (see csrc/common/params.h for what each field means).
// Pointers are the device's. Neither allocates, waits or reads device memory: both can be captured in a CUDA
// graph.
#pragma once
#include "common/params.h"
#include "cuda/runtime.h"

namespace tokenstep::cuda {

// Judges each sequence on the device and writes batch.status if it is wanted; a bad one appends nothing, and
// its queries stay as they are.
void append_kv(const PagedBatch& batch, const Stream& stream);
void merge_attention(const MergeParams& params, const Stream& stream);

}  // namespace tokenstep::cuda
