// What the parts of the attention kernel share: sizes of its tiles, its parameters, its memory.
#pragma once
#include <cstddef>

#include "common/attention_plan.h"
#include "common/params.h"
#include "cuda/warp.cuh"

namespace tokenstep::cuda {

constexpr int kTileRows =
    16;  // query rows of a work item (positions x q heads of a KV head): M of mma.m16n8k16
constexpr int kSliceTokens = 16;  // keys that a warp takes at once: two N of the scores, one K of the values

// Chunk c of a sequence belongs to lane c % kMaxLanes. A lane's chunks are one chain of online softmax, in
// order; then lanes are merged in order. Up to 128 chunks (64k tokens at D = 64, 32k at 128) a lane is a
// chunk; beyond, partial results stay bounded, and 128 x num_kv_heads items still fill a GPU.
constexpr int kMaxLanes = 128;
// A sequence of up to so many row tiles has its lanes spread over blocks; with more tiles (prefill) these are
// work enough, and a block takes all lanes of one, so that nothing partial leaves it.
constexpr int kMaxSpreadTiles = 8;

// Partial results are numbered in the order in which items are claimed; number s lies in slot s % num_slots.
struct AttentionCounters {
  unsigned long long next_item;  // to be claimed
  uint32_t num_finished;         // blocks that have left
  uint32_t padding[5];
};
static_assert(sizeof(AttentionCounters) == 32);
constexpr int part_floats_per_row(int head_dim) { return head_dim + 2; }  // outputs, maximum, sum

struct AttentionKernelParams {
  AttentionParams op;
  int group;         // num_heads / num_kv_heads
  int chunk_tokens;  // attention_plan.h
  int stages;        // of each warp's ring
  bool wide_rows;    // the caches' rows are whole pieces of 16 bytes that begin at multiples of 16
  int num_slots;
  AttentionCounters* counters;
  uint32_t*
      arrivals;  // [num_slots] of a tile's lanes, at the slot of its first; a bad one counts kBadArrival more
  uint32_t* slot_uses;  // [num_slots] partial results that were there, merged and gone
  float* parts;         // [num_slots, kTileRows, head_dim + 2]
};
constexpr uint32_t kBadArrival = 1 << 16;

// ---- work -------------------------------------------------------------------------------------------------
enum class ItemKind {
  kClear,     // rows that see no key: of no sequence, of an empty one, of a bad one
  kLane,      // one lane of a row tile
  kAllLanes,  // all of them
};

// One unit of work of a block.
struct AttentionItem {
  ItemKind kind;
  int sequence;                        // num_sequences: rows of no sequence
  int length, first_row, num_queries;  // of the sequence; length < 0: it is bad
  int kv_head;
  int num_tiles, tile;  // row i of the tile: query (16 * tile + i) / group, q head (16 * tile + i) % group
  int chunk_begin, chunk_end;     // of the sequence, from its first query's window on
  int num_lanes, lane;            // lane: counted from chunk_begin
  unsigned long long first_part;  // number of the tile's first partial result
};

// ---- shared memory ----------------------------------------------------------------------------------------
// Rows of a matrix in shared memory, in pieces of 16 bytes. Piece c of row r lies where c ^ swizzle(r) would:
// eight consecutive rows' pieces c then touch all banks once, whatever the power of two in the length of a
// row.
template <class T, int kHeadDim>
struct SharedRows {
  static constexpr int kPieceElements = 16 / sizeof(T);
  static constexpr int kPieces = kHeadDim / kPieceElements;
  static constexpr int kRowBytes = kHeadDim * sizeof(T);
  static constexpr int kSwizzleBits = kPieces % 8 == 0 ? 3 : kPieces % 4 == 0 ? 2 : kPieces % 2 == 0 ? 1 : 0;

  static __device__ __forceinline__ char* piece(char* rows, int row, int piece) {
    const int swizzle = row >> (3 - kSwizzleBits) & ((1 << kSwizzleBits) - 1);
    return rows + row * kRowBytes + (piece ^ swizzle) * 16;
  }
  static __device__ __forceinline__ const char* piece(const char* rows, int row, int index) {
    return piece(const_cast<char*>(rows), row, index);
  }
};

// Maximum, sum and factors of each row, as merges pass them on.
struct RowTotals {
  float max[kTileRows], sum[kTileRows];
  float keep[kTileRows], take[kTileRows];  // what the total, and the new part, are multiplied with
};

// T: the type of queries and results, C: of the caches.
template <class T, class C, int kHeadDim, int kWarps>
struct AttentionShared {
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kSlotBytes = 2 * kSliceTokens * kHeadDim * static_cast<int>(sizeof(C));  // of a ring

  // The queries of the tile.
  static constexpr int kQueriesBytes = kTileRows * kHeadDim * static_cast<int>(sizeof(T));
  // The total of an item that takes all lanes.
  static constexpr int kTotalBytes = kTileRows * kHeadDim * static_cast<int>(sizeof(float));

  // Where the rings were, when they are done: the warps' results; or of a merge its lanes' maxima and sums.
  static constexpr int kWarpRow = kHeadDim + 4;  // floats: rows a pair of lanes apart fall into other banks
  static constexpr int kWarpsBytes =
      kWarps * kTileRows * (kWarpRow + 3) * static_cast<int>(sizeof(float));  // and max, sum, factor
  static constexpr int kLanesBytes = kMaxLanes * kTileRows * 2 * static_cast<int>(sizeof(float));

  struct Fixed {
    RowTotals totals;
    // The scan of the sequences (attention_work.cuh).
    int items_before[kThreads + 1], slots_before[kThreads + 1];
    int length[kThreads], first_row[kThreads], num_queries[kThreads];
    int warp_items[kWarps], warp_slots[kWarps];
    unsigned long long claimed;
    AttentionItem item;
    uint32_t arrival;
  };

  static constexpr int rings_bytes(int stages) {
    int bytes = kWarps * stages * kSlotBytes;
    if (bytes < kWarpsBytes) bytes = kWarpsBytes;
    return bytes < kLanesBytes ? kLanesBytes : bytes;
  }
  static constexpr int bytes(int stages) {
    return kQueriesBytes + kTotalBytes + static_cast<int>((sizeof(Fixed) + 15) / 16 * 16) +
           rings_bytes(stages);
  }

  static __device__ __forceinline__ char* queries() { return shared_memory(); }
  static __device__ __forceinline__ float* total() {
    return reinterpret_cast<float*>(shared_memory() + kQueriesBytes);
  }
  static __device__ __forceinline__ Fixed& fixed() {
    return *reinterpret_cast<Fixed*>(shared_memory() + kQueriesBytes + kTotalBytes);
  }
  static __device__ __forceinline__ char* rings() {
    return shared_memory() + kQueriesBytes + kTotalBytes + (sizeof(Fixed) + 15) / 16 * 16;
  }
};

}  // namespace tokenstep::cuda
