// Keys and values on their way from pages to a warp: which slices of its lane's chunks a warp takes, where in
// the pages they lie, and a ring in shared memory that cp.async fills ahead.
//
// Each lane of the warp works out where one token lies, a stage before it is needed; when a slice is copied,
// the places are shuffled to the lanes that copy the pieces of that token's row. A page of one token costs
// what a page of 256 costs. Rows that nobody sees are zeros and are not read. New rows come from new_k and
// new_v, rotated and rounded (or quantised) as they will be in their page, which another block may be
// writing.
#pragma once
#include "cuda/attention_rows.cuh"

namespace tokenstep::cuda {

// The slices of one warp in some chunks: every kWarps-th of a chunk, in the chunks chunk, chunk + kMaxLanes,
// ... before chunk_end, as far as some row of the tile sees them. Which slice is whose is fixed by its
// position.
template <int kWarps>
class SliceCursor {
 public:
  __device__ __forceinline__ SliceCursor(const TileRows& rows, int chunk, int chunk_end)
      : rows_(rows), chunk_(chunk), chunk_end_(chunk_end) {
    enter_chunk();
  }
  __device__ __forceinline__ bool valid() const { return chunk_ < chunk_end_; }
  __device__ __forceinline__ int token() const { return token_; }  // the slice's first
  __device__ __forceinline__ void advance() {
    token_ += kWarps * kSliceTokens;
    if (token_ < end_) return;
    chunk_ += kMaxLanes;
    enter_chunk();
  }

 private:
  __device__ __forceinline__ void enter_chunk() {
    for (; chunk_ < chunk_end_; chunk_ += kMaxLanes) {
      const int chunk_tokens = rows_.params.chunk_tokens, begin = chunk_ * chunk_tokens;
      end_ = begin + min(chunk_tokens, rows_.seen_end - begin);
      const int first = max(rows_.seen_begin - begin, 0) / kSliceTokens;
      const int mine = first + (warp_id() - first % kWarps + kWarps) % kWarps;
      token_ = begin + mine * kSliceTokens;
      if (token_ < end_) return;
    }
  }

  const TileRows& rows_;
  int chunk_, chunk_end_, end_ = 0, token_ = 0;
};

// Where one token's rows are.
struct TokenPlace {
  static constexpr int kNowhere = -1, kPage = -2;
  int source = kNowhere;       // or its row of new_k and new_v
  int64_t key = 0, value = 0;  // of a page: elements from the caches' beginning
};

template <class T, class C, int kHeadDim>
class CacheRing {
 public:
  using Rows = SharedRows<C, kHeadDim>;
  static constexpr int kSideBytes = kSliceTokens * Rows::kRowBytes;

  // `memory` is this warp's.
  __device__ __forceinline__ CacheRing(const TileRows& rows, char* memory)
      : rows_(rows),
        batch_(rows.params.op.batch),
        memory_(memory),
        table_(batch_.block_table + rows.item.sequence * batch_.block_table_stride) {}

  __device__ __forceinline__ char* keys(int stage) const { return memory_ + stage * 2 * kSideBytes; }
  __device__ __forceinline__ char* values(int stage) const { return keys(stage) + kSideBytes; }

  // Of token `slice + lane % 16`. Block ids are judged here: found_bad_block() of any lane is the item's
  // verdict.
  __device__ __forceinline__ TokenPlace find(int slice) {
    TokenPlace place;
    const int token = slice + lane_id() % kSliceTokens;
    if (token < rows_.seen_begin || token >= rows_.seen_end) return place;
    const int column = token / batch_.block_size, slot = token - column * batch_.block_size;
    const int block = __ldg(table_ + column);
    if (static_cast<unsigned>(block) >= static_cast<unsigned>(batch_.num_blocks)) {
      found_bad_block_ = true;
    } else if (token >= rows_.new_begin) {
      place.source = rows_.item.first_row + token - rows_.new_begin;
    } else {
      const auto offset = [&](const CacheView& cache) {
        return block * cache.block_stride + slot * cache.token_stride +
               rows_.item.kv_head * cache.head_stride;
      };
      place = {TokenPlace::kPage, offset(batch_.k_cache), offset(batch_.v_cache)};
    }
    return place;
  }

  // All lanes, each with its token's place. The caller commits.
  __device__ __forceinline__ void copy(int stage, const TokenPlace& place) {
    const C* const k_cache = static_cast<const C*>(batch_.k_cache.data);
    const C* const v_cache = static_cast<const C*>(batch_.v_cache.data);
    const int lane = recomputed(lane_id());
    [[maybe_unused]] constexpr int kUnroll = kHeadDim > 128 ? 2 : 4;  // more would be more registers
#pragma unroll kUnroll
    for (int i = 0; i < kSliceTokens * Rows::kPieces / kWarpSize; ++i) {
      const int number = i * kWarpSize + lane, token = number / Rows::kPieces, piece = number % Rows::kPieces;
      const int source = __shfl_sync(kAllLanes, place.source, token);
      const int64_t key = __shfl_sync(kAllLanes, place.key, token);
      const int64_t value = __shfl_sync(kAllLanes, place.value, token);
      if (source >= 0) continue;
      const bool exists = source == TokenPlace::kPage && piece * Rows::kPieceElements < batch_.head_dim;
      const int64_t element = exists ? piece * Rows::kPieceElements : 0;
      copy_piece(Rows::piece(keys(stage), token, piece), k_cache + key + element, piece, exists);
      copy_piece(Rows::piece(values(stage), token, piece), v_cache + value + element, piece, exists);
    }
    unsigned fresh = __ballot_sync(kAllLanes, place.source >= 0) & 0xffffu;
#pragma unroll 1
    for (; fresh; fresh &= fresh - 1) {
      const int token = __ffs(static_cast<int>(fresh)) - 1;
      copy_new_row(stage, token, __shfl_sync(kAllLanes, place.source, token));
    }
  }

  __device__ __forceinline__ bool found_bad_block() const { return found_bad_block_; }
  __device__ __forceinline__ void judge(int column) {
    const int block = __ldg(table_ + column);
    found_bad_block_ |= static_cast<unsigned>(block) >= static_cast<unsigned>(batch_.num_blocks);
  }

 private:
  // Piece number `piece` of a row, from its first element; of rows that are not whole pieces, in halves.
  __device__ __forceinline__ void copy_piece(char* shared, const C* from, int piece, bool exists) const {
    if constexpr (sizeof(C) == 1) {
      if (!rows_.params.wide_rows) {
        constexpr int kHalf = Rows::kPieceElements / 2;
        const bool has_second = exists && piece * Rows::kPieceElements + kHalf < batch_.head_dim;
        copy_async_8(shared, from, exists);
        copy_async_8(shared + kHalf, from + (has_second ? kHalf : 0), has_second);
        return;
      }
    }
    copy_async_16(shared, from, exists);
  }

  __device__ __forceinline__ void copy_new_row(int stage, int token, int row) {
    const int kv_head = rows_.item.kv_head;
    const T* const key = head_of<T>(batch_.new_k, row, kv_head);
    const T* const value = head_of<T>(batch_.new_v, row, kv_head);
    const float key_scale = scale_of(batch_.k_scale, kv_head),
                value_scale = scale_of(batch_.v_scale, kv_head);
    const int64_t position = rows_.new_begin + row - rows_.item.first_row;
#pragma unroll 1
    for (int i = lane_id(); i < kHeadDim; i += kWarpSize) {
      const int offset = i % Rows::kPieceElements, piece = i / Rows::kPieceElements;
      const bool exists = i < batch_.head_dim;
      const C zero = narrow<C>(0.0f);
      reinterpret_cast<C*>(Rows::piece(keys(stage), token, piece))[offset] =
          exists ? stored_key<T, C>(batch_.rope, position, key, i, key_scale) : zero;
      reinterpret_cast<C*>(Rows::piece(values(stage), token, piece))[offset] =
          exists ? stored_value<T, C>(value, i, value_scale) : zero;
    }
  }

  const TileRows& rows_;
  const PagedBatch& batch_;
  char* const memory_;
  const int32_t* const table_;
  bool found_bad_block_ = false;
};

}  // namespace tokenstep::cuda
