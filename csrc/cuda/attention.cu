#include <stdexcept>

#include "common/check.h"
#include "cuda/attention.h"
#include "cuda/attention_heuristics.h"
#include "cuda/attention_workspace.h"
#include "cuda/element.cuh"

namespace tokenstep::cuda {
namespace {

// Whether the cache's rows can be copied in pieces of 16 bytes.
bool has_wide_rows(const CacheView& cache, const PagedBatch& batch) {
  constexpr int64_t kPieceBytes = 16;
  const int64_t element = bytes_of(batch.cache_dtype);
  const auto fits = [](int64_t bytes) { return bytes % kPieceBytes == 0; };
  return fits(static_cast<int64_t>(reinterpret_cast<uintptr_t>(cache.data))) &&
         fits(batch.head_dim * element) && fits(cache.block_stride * element) &&
         fits(cache.token_stride * element) && fits(cache.head_stride * element);
}

template <class T>
void launch_for_cache(AttentionKernelParams& params, const Stream& stream) {
  switch (params.op.batch.cache_dtype) {
    case DType::kFloat8E4M3:
      return launch_attention<T, Float8>(params, stream);
    case DType::kInt8:
      return launch_attention<T, Int8>(params, stream);
    default:
      return launch_attention<T, T>(params, stream);
  }
}

int num_slots_of(int device_id) {
  return forced_attention.slots ? forced_attention.slots : attention_slots(limits_of(device_id), kMaxLanes);
}

}  // namespace

void force_attention_geometry(int grid, int stages, int slots) {
  if (grid < 0 || stages < 0 || stages > 3 || (slots != 0 && slots < 2))
    raise<ValueError>(
        "testing.force_attention_geometry",
        "grid = %d, stages = %d, slots = %d, expected numbers of blocks, of 1 to 3 stages, and of 2 slots "
        "or more, or 0",
        grid, stages, slots);
  forced_attention = {grid, stages, slots};
}

AttentionWorkspaceBytes attention_workspace_bytes(int device_id) {
  const int num_slots = num_slots_of(device_id);
  return {AttentionWorkspace::bytes(num_slots), AttentionWorkspace::zeroed_bytes(num_slots)};
}

void paged_attention(const AttentionParams& op, const Stream& stream) {
  const PagedBatch& batch = op.batch;
  constexpr const char* kOp = "paged_attention";
  if (int64_t{batch.num_queries} * batch.num_heads > INT32_MAX)
    raise<ValueError>(kOp, "q has %d rows of %d heads, expected less than 2^31 in all", batch.num_queries,
                      batch.num_heads);
  if (batch.num_sequences == 0 && batch.num_queries == 0) return;

  AttentionKernelParams params{};
  params.op = op;
  params.group = batch.num_heads / batch.num_kv_heads;
  params.chunk_tokens = chunk_tokens(batch.head_dim, batch.cache_dtype);
  params.wide_rows = has_wide_rows(batch.k_cache, batch) && has_wide_rows(batch.v_cache, batch);
  params.num_slots = num_slots_of(stream.device_id);
  if (op.workspace_bytes < static_cast<int64_t>(AttentionWorkspace::bytes(params.num_slots)))
    throw std::logic_error("tokenstep: paged_attention without its workspace");
  char* const workspace = static_cast<char*>(op.workspace);
  params.counters = reinterpret_cast<AttentionCounters*>(workspace);
  params.arrivals = reinterpret_cast<uint32_t*>(workspace + sizeof(AttentionCounters));
  params.slot_uses = params.arrivals + params.num_slots;
  params.parts = reinterpret_cast<float*>(workspace + AttentionWorkspace::zeroed_bytes(params.num_slots));
  switch (batch.dtype) {
    case DType::kFloat32:
      return launch_for_cache<float>(params, stream);
    case DType::kFloat16:
      return launch_for_cache<__half>(params, stream);
    default:
      return launch_for_cache<__nv_bfloat16>(params, stream);
  }
}

}  // namespace tokenstep::cuda
