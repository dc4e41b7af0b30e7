#include "cuda/kv_append.h"
#include "cuda/launch.cuh"
#include "cuda/merge_kernel.cuh"

namespace tokenstep::cuda {
namespace {

template <class T>
void launch_merge(const MergeParams& params, const Stream& stream) {
  const bool aligned =
      has_aligned_pieces<T>(params.outs, params.part_stride, params.row_stride, params.head_stride);
  const int64_t threads = int64_t{params.num_queries} * params.num_heads * (params.head_dim / kPieceElements);
  launch<merge_attention_kernel<T>>(
      {.name = "merge_attention",
       .grid = static_cast<unsigned>((threads + kMergeThreads - 1) / kMergeThreads),
       .block = kMergeThreads},
      stream, params, aligned);
}

}  // namespace

void merge_attention(const MergeParams& params, const Stream& stream) {
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_merge<float>(params, stream);
    case DType::kFloat16:
      return launch_merge<__half>(params, stream);
    default:
      return launch_merge<__nv_bfloat16>(params, stream);
  }
}

}  // namespace tokenstep::cuda
