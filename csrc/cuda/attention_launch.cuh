// Launcher of the attention kernel for one type; each type is instantiated in a file of its own.
#pragma once
#include <stdexcept>
#include <string>

#include "common/check.h"
#include "cuda/attention_heuristics.h"
#include "cuda/attention_kernel.cuh"
#include "cuda/attention_workspace.h"
#include "cuda/launch.cuh"

namespace tokenstep::cuda {

// Work items that sequences of these shapes can have at most.
inline int64_t most_items(const AttentionKernelParams& params) {
  const PagedBatch& batch = params.op.batch;
  const int64_t tokens = std::min<int64_t>(int64_t{batch.max_blocks} * batch.block_size, INT32_MAX);
  const int64_t lanes =
      std::clamp<int64_t>((tokens + params.chunk_tokens - 1) / params.chunk_tokens, 1, kMaxLanes);
  const int64_t tiles = int64_t{batch.num_queries} * params.group / kTileRows + batch.num_sequences;
  return (tiles * lanes + 1) * batch.num_kv_heads;
}

template <class T, class C, int kHeadDim>
void launch_attention_of(AttentionKernelParams& params, const Stream& stream) {
  constexpr int kWarps = attention_warps(kHeadDim, sizeof(T));
  using Shared = AttentionShared<T, C, kHeadDim, kWarps>;
  constexpr auto kSharedBytes = [](int stages) { return Shared::bytes(stages); };
  static_assert(fits_every_architecture(kSharedBytes));
  const DeviceLimits& limits = limits_of(stream.device_id);
  const auto geometry = choose_attention_geometry(kSharedBytes, limits);
  if (!geometry) throw std::runtime_error("tokenstep.paged_attention: this GPU has too little shared memory");
  params.stages = forced_attention.stages ? forced_attention.stages : geometry->stages;
  const int grid = attention_grid(*geometry, limits, most_items(params));
  const int blocks = forced_attention.grid ? forced_attention.grid : grid;
  launch<attention_kernel<T, C, kHeadDim, kWarps>>(
      {.name = "paged_attention",
       .grid = static_cast<unsigned>(blocks),
       .block = static_cast<unsigned>(Shared::kThreads),
       .shared_bytes = static_cast<size_t>(Shared::bytes(params.stages))},
      stream, params);
}

// The kernel of the smallest of these head sizes that holds the batch's.
template <class T, class C, int kHeadDim, int... kLarger>
void launch_attention_in(AttentionKernelParams& params, const Stream& stream) {
  if constexpr (sizeof...(kLarger) > 0)
    if (params.op.batch.head_dim > kHeadDim) return launch_attention_in<T, C, kLarger...>(params, stream);
  launch_attention_of<T, C, kHeadDim>(params, stream);
}

}  // namespace tokenstep::cuda
