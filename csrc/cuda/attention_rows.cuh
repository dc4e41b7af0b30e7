// The query rows of an item: where they stand, and their way into shared memory.
#pragma once
#include "cuda/attention_fragments.cuh"
#include "cuda/attention_work.cuh"
#include "cuda/kv_append.cuh"

namespace tokenstep::cuda {

// The rows of one tile, and which keys they see.
struct TileRows {
  const AttentionKernelParams& params;
  const AttentionItem& item;
  int count;                          // at most kTileRows
  int first_position, last_position;  // of its queries
  int seen_begin, seen_end;           // keys that some row sees
  int new_begin;                      // keys from here on come from new_k and new_v

  __device__ __forceinline__ TileRows(const AttentionKernelParams& p, const AttentionItem& i)
      : params(p), item(i) {
    const int first = item.tile * kTileRows, all = item.num_queries * params.group;
    count = min(kTileRows, all - first);
    first_position = position_of(0);
    last_position = position_of(count - 1);
    seen_begin = static_cast<int>(first_key(first_position, params.op.window));
    seen_end = last_position + 1;
    new_begin = params.op.batch.new_k.data ? item.length - item.num_queries : item.length;
  }

  __device__ __forceinline__ int query_of(int row) const {
    return (item.tile * kTileRows + row) / params.group;
  }
  __device__ __forceinline__ int position_of(int row) const {
    return item.length - item.num_queries + query_of(row);
  }
  __device__ __forceinline__ int head_of_row(int row) const {
    return item.kv_head * params.group + (item.tile * kTileRows + row) % params.group;
  }
  __device__ __forceinline__ int64_t row_of_q(int row) const { return item.first_row + query_of(row); }
};

// Rotated and rounded, in pieces as SharedRows has them and dimensions as keys have them; rows beyond the
// tile's and dimensions beyond the head's are zeros.
template <class T, class C, int kHeadDim>
__device__ __forceinline__ void load_queries(const TileRows& rows, char* shared, int num_threads) {
  using Rows = SharedRows<T, kHeadDim>;
  const PagedBatch& batch = rows.params.op.batch;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * Rows::kPieces; i += num_threads) {
    const int row = i / Rows::kPieces, piece = i % Rows::kPieces;
    alignas(16) T elements[Rows::kPieceElements];
    const int safe_row = row < rows.count ? row : 0;
    const T* const head = head_of<T>(batch.q, rows.row_of_q(safe_row), rows.head_of_row(safe_row));
    const int position = rows.position_of(safe_row);
#pragma unroll
    for (int j = 0; j < Rows::kPieceElements; ++j) {
      const int dim = Fragments<T, C, kHeadDim>::dimension(piece * Rows::kPieceElements + j);
      const bool exists = row < rows.count && dim < batch.head_dim;
      elements[j] = narrow<T>(exists ? rotated(batch.rope, position, head, dim) : 0.0f);
    }
    uint4 words;
    memcpy(&words, elements, sizeof words);
    *reinterpret_cast<uint4*>(Rows::piece(shared, row, piece)) = words;
  }
}

}  // namespace tokenstep::cuda
