// Append in a launch of its own: rotate new keys and, in place, queries; round to the cache's type or
// quantise; write the pages.
//
// A block takes some heads of one row: of q if it is rotated, then of k, then of v. A team of 8, 16 or 32
// lanes has a head, a lane eight dimensions: new rows are read once and pages written once, in pieces of 16
// bytes where alignment permits. Rotated heads go through shared memory, for pairs may lie anywhere in them
// and q is overwritten; what is not rotated passes bit for bit. Each block judges its row's sequence by
// itself (lengths, and the ids of the blocks that its new rows need), so that none waits for another. The
// bits are those of csrc/cpu/kv_append_kernel.cpp.
#pragma once
#include "cuda/kv_append.cuh"
#include "cuda/piece.cuh"
#include "cuda/warp.cuh"

namespace tokenstep::cuda {

constexpr int kAppendThreads = 128;

struct AppendParams {
  PagedBatch batch;
  int team_lanes;      // that have a head
  int num_heads;       // of a row, those of q included if they are rotated
  int blocks_per_row;  // for all heads
  // Rows whose pieces begin at multiples of their size.
  bool q_aligned, k_aligned, v_aligned, k_cache_aligned, v_cache_aligned;
};

// Of one sequence.
struct NewRows {
  int64_t first_row = 0, first_position = 0;
  int count = 0;  // 0: nothing to append, or not to be appended
};

class AppendJudge {
 public:
  __device__ __forceinline__ explicit AppendJudge(const PagedBatch& batch) : batch_(batch) {}

  // All threads of the block.
  __device__ __forceinline__ AttentionStatus judge(int sequence, NewRows& rows) const {
    const int64_t begin = batch_.query_start ? batch_.query_start[sequence] : sequence;
    const int64_t end = batch_.query_start ? batch_.query_start[sequence + 1] : sequence + 1;
    const int64_t length = batch_.seq_lens[sequence], count = end - begin;
    const bool bad_length = begin < 0 || count < 0 || end > batch_.num_queries || length < 0 ||
                            length > int64_t{batch_.max_blocks} * batch_.block_size ||
                            (length > 0 && length < count) ||
                            (batch_.rope.cos && count > 0 && length > batch_.rope.max_position);
    if (bad_length) return AttentionStatus::kBadLength;
    if (length == 0 || count == 0) return AttentionStatus::kOk;
    const int64_t first_position = length - count;
    const int32_t* const table = batch_.block_table + sequence * batch_.block_table_stride;
    bool bad_block = false;
    for (int64_t i = first_position / batch_.block_size + threadIdx.x; i <= (length - 1) / batch_.block_size;
         i += kAppendThreads)
      bad_block |= static_cast<uint32_t>(table[i]) >= static_cast<uint32_t>(batch_.num_blocks);
    if (__syncthreads_or(bad_block)) return AttentionStatus::kBadBlock;
    rows = {begin, first_position, static_cast<int>(count)};
    return AttentionStatus::kOk;
  }

 private:
  const PagedBatch& batch_;
};

// The sequence that a row belongs to, num_sequences if none. All threads of the block.
__device__ __forceinline__ int sequence_of_row(const PagedBatch& batch, int row, int* shared) {
  if (!batch.query_start) return row;
  if (threadIdx.x == 0) *shared = batch.num_sequences;
  __syncthreads();
  for (int r = static_cast<int>(threadIdx.x); r < batch.num_sequences; r += kAppendThreads)
    if (batch.query_start[r] <= row && row < batch.query_start[r + 1]) atomicMin(shared, r);
  __syncthreads();
  return *shared;
}

// One piece of a head, `dim` its first dimension. `turned`: the whole head as floats in shared memory if it
// is to be rotated, else null.
template <class T, class C>
__device__ __forceinline__ Piece<C> stored_piece(const Piece<T>& in, const RopeParams& rope, int64_t position,
                                                 const float* turned, int dim, float scale) {
  Piece<C> out;
#pragma unroll
  for (int i = 0; i < kPieceElements; ++i) {
    const bool rotates = turned && dim + i < rope.rotary_dim;
    if constexpr (std::is_same_v<T, C>) {
      if (!rotates) {
        out.element[i] = in.element[i];
        continue;
      }
    }
    const float x = rotates ? rotated(rope, position, turned, dim + i) : widen(in.element[i]);
    out.element[i] = stored<C>(x, scale);
  }
  return out;
}

template <class T, class C>
__global__ void __launch_bounds__(kAppendThreads)
    append_kv_kernel(const __grid_constant__ AppendParams params) {
  const PagedBatch& batch = params.batch;
  const int row = static_cast<int>(blockIdx.x) / params.blocks_per_row;
  const int part = static_cast<int>(blockIdx.x) % params.blocks_per_row;
  const int thread = static_cast<int>(threadIdx.x);
  const AppendJudge judge(batch);

  NewRows rows;
  if (batch.status && part == 0 && row < batch.num_sequences) {  // row stands for a sequence here
    const AttentionStatus status = judge.judge(row, rows);
    if (thread == 0) batch.status[row] = static_cast<int32_t>(status);
  }
  if (row >= batch.num_queries) return;
  float* const heads = reinterpret_cast<float*>(shared_memory());
  const int sequence = sequence_of_row(batch, row, reinterpret_cast<int*>(heads));
  if (sequence >= batch.num_sequences) return;
  rows = {};
  if (judge.judge(sequence, rows) != AttentionStatus::kOk || rows.count == 0) return;
  const int64_t position = rows.first_position + row - rows.first_row;

  const int team = thread / params.team_lanes, dim = thread % params.team_lanes * kPieceElements;
  const int number = part * (kAppendThreads / params.team_lanes) + team;  // of the row's heads
  const int num_q_heads = params.num_heads - 2 * batch.num_kv_heads;
  const bool works = number < params.num_heads && dim < batch.head_dim;
  const bool is_q = number < num_q_heads, is_value = number >= num_q_heads + batch.num_kv_heads;
  const int head = is_q ? number : (number - num_q_heads) % batch.num_kv_heads;
  const RowsView& source = is_q ? batch.q : is_value ? batch.new_v : batch.new_k;
  const bool aligned = is_q ? params.q_aligned : is_value ? params.v_aligned : params.k_aligned;
  const bool turns = works && !is_value && batch.rope.cos;

  Piece<T> piece = {};
  if (works) piece = load_piece(head_of<T>(source, row, head) + dim, aligned);
  float* const turned = heads + team * params.team_lanes * kPieceElements;
  if (turns) {
#pragma unroll
    for (int i = 0; i < kPieceElements; ++i) turned[dim + i] = widen(piece.element[i]);
  }
  __syncwarp();  // a team's lanes are of one warp
  if (!works) return;
  const float* const whole = turns ? turned : nullptr;
  if (is_q) {
    if (dim < batch.rope.rotary_dim)
      store_piece(head_of<T>(batch.q, row, head) + dim,
                  stored_piece<T, T>(piece, batch.rope, position, whole, dim, 1.0f), params.q_aligned);
    return;
  }
  const int64_t block = batch.block_table[sequence * batch.block_table_stride + position / batch.block_size];
  const int slot = static_cast<int>(position % batch.block_size);
  const float* const scales = is_value ? batch.v_scale : batch.k_scale;
  store_piece(head_of<C>(is_value ? batch.v_cache : batch.k_cache, block, slot, head) + dim,
              stored_piece<T, C>(piece, batch.rope, position, whole, dim, scale_of(scales, head)),
              is_value ? params.v_cache_aligned : params.k_cache_aligned);
}

}  // namespace tokenstep::cuda
