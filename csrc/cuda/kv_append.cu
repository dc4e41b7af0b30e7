#include <algorithm>

#include "cuda/kv_append.h"
#include "cuda/kv_append_kernel.cuh"
#include "cuda/launch.cuh"

namespace tokenstep::cuda {
namespace {

template <class T, class C>
void launch_append(const PagedBatch& batch, const Stream& stream) {
  const auto rows_aligned = [](const RowsView& rows) {
    return has_aligned_pieces<T>(rows.data, rows.row_stride, rows.head_stride);
  };
  const auto cache_aligned = [](const CacheView& cache) {
    return has_aligned_pieces<C>(cache.data, cache.block_stride, cache.token_stride, cache.head_stride);
  };
  AppendParams params = {.batch = batch,
                         .team_lanes = 8,
                         .num_heads = 2 * batch.num_kv_heads,
                         .blocks_per_row = 1,
                         .q_aligned = rows_aligned(batch.q),
                         .k_aligned = rows_aligned(batch.new_k),
                         .v_aligned = rows_aligned(batch.new_v),
                         .k_cache_aligned = cache_aligned(batch.k_cache),
                         .v_cache_aligned = cache_aligned(batch.v_cache)};
  if (batch.q.data && batch.rope.cos) params.num_heads += batch.num_heads;
  while (params.team_lanes * kPieceElements < batch.head_dim) params.team_lanes *= 2;
  const int heads_per_block = kAppendThreads / params.team_lanes;
  params.blocks_per_row = (params.num_heads + heads_per_block - 1) / heads_per_block;
  const int rows = std::max(batch.num_queries, batch.status ? batch.num_sequences : 0);
  launch<append_kv_kernel<T, C>>({.name = "append_kv",
                                  .grid = static_cast<unsigned>(rows) * params.blocks_per_row,
                                  .block = kAppendThreads,
                                  .shared_bytes = kAppendThreads * kPieceElements * sizeof(float)},
                                 stream, params);
}

template <class T>
void launch_append(const PagedBatch& batch, const Stream& stream) {
  switch (batch.cache_dtype) {
    case DType::kFloat8E4M3:
      return launch_append<T, Float8>(batch, stream);
    case DType::kInt8:
      return launch_append<T, Int8>(batch, stream);
    default:
      return launch_append<T, T>(batch, stream);
  }
}

}  // namespace

void append_kv(const PagedBatch& batch, const Stream& stream) {
  switch (batch.dtype) {
    case DType::kFloat32:
      return launch_append<float>(batch, stream);
    case DType::kFloat16:
      return launch_append<__half>(batch, stream);
    default:
      return launch_append<__nv_bfloat16>(batch, stream);
  }
}

}  // namespace tokenstep::cuda
