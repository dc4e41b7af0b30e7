// Paged attention in one launch: append, rotation, gather of pages, scores, scale, softcap, ALiBi, mask,
// online softmax, weighted values, merge of chunks, sink, log-sum-exp.
//
// Never materialised: a contiguous copy of the cache, scores beyond 16 rows of 16 tokens a warp, the mask,
// rotated queries, a plan. A work item is (sequence, KV head, tile of 16 query rows, lane of chunks)
// (attention_work.cuh); a block's warps each take every fourth slice of 16 tokens, through a ring of their
// own in shared memory:
//
//   find places   lanes read the block table, a slice ahead of
//   copy          cp.async of 16-byte pieces, a ring ahead of              no barrier of the block,
//   score         16 rows x 16 tokens: ldmatrix, mma                       two of the warp a slice
//   weigh         online softmax in registers
//   accumulate    16 rows x head_dim: ldmatrix.trans, mma
//
// Then the warps are merged, and the lanes, by whoever comes last (attention_merge.cuh). Bytes from memory:
// keys and values once per 16 query rows of a KV head. Barriers of the block: one before a lane's slices,
// three to merge its warps, and for a lane among others three more.
//
// A row's bits depend on its own sequence alone: slices, warps, chunks and lanes lie at fixed positions,
// mma's rows do not mix, and what a row does not see changes none of its bits. Source: FlashAttention-2 (Dao,
// arXiv 2307.08691), PagedAttention (Kwon et al., arXiv 2309.06180), Flash-Decoding for the chunks.
#pragma once
#include "cuda/attention_merge.cuh"

namespace tokenstep::cuda {

template <class T, class C, int kHeadDim, int kWarps>
class AttentionBlock {
  using Shared = AttentionShared<T, C, kHeadDim, kWarps>;
  using Merge = AttentionMerge<T, C, kHeadDim, kWarps>;
  using Ring = CacheRing<T, C, kHeadDim>;
  using Math = SliceMath<T, C, kHeadDim>;
  static constexpr int kThreads = Shared::kThreads;

 public:
  __device__ __forceinline__ AttentionBlock(const AttentionKernelParams& params, bool reuses_slots)
      : params_(params), batch_(params.op.batch), reuses_slots_(reuses_slots) {}

  __device__ __forceinline__ void run(const AttentionItem& item) {
    if (item.kind == ItemKind::kClear) return clear_sequence(item);
    const TileRows rows(params_, item);
    const bool takes_all = item.kind == ItemKind::kAllLanes;
    bool bad = item.num_tiles > 1 && __syncthreads_or(judge(rows));
    if (!takes_all || !bad) {
      const Merge merge(rows);
      if (takes_all) merge.clear_total();
      load_queries<T, C, kHeadDim>(rows, Shared::queries(), kThreads);
      const int lanes = takes_all ? item.num_lanes : 1;
#pragma unroll 1
      for (int i = 0; i < lanes; ++i) {
        const int chunk = item.chunk_begin + (takes_all ? lane_in_order(item, i) : item.lane);
        if (takes_all && !sees_lane(rows, chunk)) continue;  // would change no bit
        bad |= attend_lane(rows, merge, chunk);
        if (takes_all) merge.add_warps_to_total();
      }
    }
    finish(rows, bad);
  }

 private:
  // ---- rows that see no key -------------------------------------------------------------------------------
  __device__ __forceinline__ void clear_sequence(const AttentionItem& item) const {
    if (item.sequence == batch_.num_sequences) {  // rows before and behind those of all sequences
      const int64_t rows = batch_.num_queries;
      const int64_t begin = batch_.query_start[0], end = batch_.query_start[batch_.num_sequences];
      clear_rows(0, min(begin, rows), item.kv_head);
      return clear_rows(max(end, int64_t{0}), rows, item.kv_head);
    }
    clear_rows(item.first_row, int64_t{item.first_row} + item.num_queries, item.kv_head);
    report(item, item.length < 0 ? AttentionStatus::kBadLength : AttentionStatus::kOk);
  }
  __device__ __forceinline__ void clear_rows(int64_t begin, int64_t end, int kv_head) const {
    for (int64_t row = begin; row < end; ++row)
      for (int i = static_cast<int>(threadIdx.x); i < params_.group * batch_.head_dim; i += kThreads) {
        const int head = kv_head * params_.group + i / batch_.head_dim, column = i % batch_.head_dim;
        head_of<T>(params_.op.out, row, head)[column] = narrow<T>(0.0f);
        if (params_.op.lse && column == 0) params_.op.lse[row * batch_.num_heads + head] = kMinusInfinity;
      }
  }
  __device__ __forceinline__ void report(const AttentionItem& item, AttentionStatus status) const {
    if (threadIdx.x == 0 && item.kv_head == 0 && batch_.status)
      batch_.status[item.sequence] = static_cast<int32_t>(status);
  }

  // ---- block ids ------------------------------------------------------------------------------------------
  // One tile sees all keys of the sequence's first query and its last, and finds bad ids as it goes. Several
  // tiles each see less, and their verdicts must agree: each judges all ids of its lanes.
  __device__ __forceinline__ bool judge(const TileRows& rows) const {
    const AttentionItem& item = rows.item;
    Ring ring(rows, nullptr);
    const auto judge_tokens = [&](int begin, int end) {
      for (int i = begin / batch_.block_size + static_cast<int>(threadIdx.x);
           i <= (end - 1) / batch_.block_size; i += kThreads)
        ring.judge(i);
    };
    const int begin = static_cast<int>(first_key(item.length - item.num_queries, params_.op.window));
    if (item.kind == ItemKind::kAllLanes) {
      judge_tokens(begin, item.length);
    } else {
      for (int chunk = item.chunk_begin + item.lane; chunk < item.chunk_end; chunk += kMaxLanes) {
        const int first = chunk * params_.chunk_tokens;
        judge_tokens(max(begin, first), first + min(params_.chunk_tokens, item.length - first));
      }
    }
    return ring.found_bad_block();
  }

  // ---- one lane -------------------------------------------------------------------------------------------
  // Leaves the warps' results for the merge. Returns whether some thread met a bad block id.
  __device__ __forceinline__ bool attend_lane(const TileRows& rows, const Merge& merge, int chunk) const {
    SliceOutputs<kHeadDim> outputs;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) outputs[j][i] = 0.0f;
    RunningRows running;
    Ring ring(rows, Shared::rings() + warp_id() * params_.stages * Shared::kSlotBytes);
    Math math;
    const ScoreRules rules(rows, sizeof(C) == 1 ? batch_.k_scale[rows.item.kv_head] : 1.0f);

    const int stages = params_.stages;
    SliceCursor<kWarps> coming(rows, chunk, rows.item.chunk_end), current = coming;
    TokenPlace place;
    if (coming.valid()) place = ring.find(coming.token());
    int fill = 0, use = 0;
    const auto copy_next = [&] {
      if (coming.valid()) {
        ring.copy(fill, place);
        coming.advance();
        if (coming.valid()) place = ring.find(coming.token());
      }
      copy_async_commit();
      fill = fill + 1 == stages ? 0 : fill + 1;
    };
#pragma unroll 1
    for (int ahead = 1 - stages; ahead < 0; ++ahead) copy_next();
    __syncthreads();  // the queries are there
    math.load_queries(Shared::queries());
#pragma unroll 1
    for (; current.valid(); current.advance()) {
      copy_next();
      wait_for_stage(stages);
      __syncwarp();
      attend_slice(rows, rules, math, ring, use, current.token(), running, outputs);
      __syncwarp();
      use = use + 1 == stages ? 0 : use + 1;
    }
    return merge.leave_warp(running, outputs, ring.found_bad_block());
  }

  // Whether some row of the tile sees a token of the lane that begins with this chunk.
  __device__ __forceinline__ bool sees_lane(const TileRows& rows, int chunk) const {
    for (; chunk < rows.item.chunk_end; chunk += kMaxLanes) {
      const int begin = chunk * params_.chunk_tokens;
      if (begin < rows.seen_end && rows.seen_begin - begin < params_.chunk_tokens) return true;
    }
    return false;
  }

  // The oldest copies of a full ring.
  __device__ __forceinline__ static void wait_for_stage(int stages) {
    if (stages >= 3)
      copy_async_wait<2>();
    else if (stages == 2)
      copy_async_wait<1>();
    else
      copy_async_wait<0>();
  }

  __device__ __forceinline__ static void attend_slice(const TileRows& rows, const ScoreRules& rules,
                                                      const Math& math, const Ring& ring, int stage,
                                                      int slice, RunningRows& running,
                                                      SliceOutputs<kHeadDim>& outputs) {
    const bool all_see_all = slice + kSliceTokens <= rows.first_position + 1 &&
                             slice >= first_key(rows.last_position, rows.params.op.window);
    SliceScores scores;
    math.score(ring.keys(stage), scores);
    rules.apply(slice, all_see_all, scores);
    float alpha[2];
    running.add(scores, alpha);
    const bool mixed = !all_see_all && rows.first_position != rows.last_position;
    math.accumulate(ring.values(stage), scores, alpha, rows, rules, slice, mixed, outputs);
  }

  // ---- the end of an item ---------------------------------------------------------------------------------
  __device__ __forceinline__ void finish(const TileRows& rows, bool bad) const {
    const AttentionItem& item = rows.item;
    const Merge merge(rows);
    if (item.kind == ItemKind::kLane && item.num_lanes > 1) {
      if (!leave_and_arrive(rows, merge, bad)) return;
      if (!bad) merge.finish_from_parts();
      give_back_slots(item, merge);
    } else if (!bad) {
      if (item.kind == ItemKind::kLane)
        merge.finish_from_warps();
      else
        merge.finish_total();
    }
    if (bad)
      merge.clear_rows();
    else
      append_rows(rows);
    if (item.tile == 0) report(item, bad ? AttentionStatus::kBadBlock : AttentionStatus::kOk);
  }

  // Whether this block is the last of the tile's; `bad` is then the verdict of all.
  __device__ __forceinline__ bool leave_and_arrive(const TileRows& rows, const Merge& merge,
                                                   bool& bad) const {
    const AttentionItem& item = rows.item;
    const unsigned long long number = item.first_part + static_cast<unsigned>(item.lane);
    if (reuses_slots_) {
      if (threadIdx.x == 0) {
        merge.wait_for_slot(item.first_part);  // where arrivals are counted
        merge.wait_for_slot(number);
      }
      __syncthreads();
    }
    merge.leave_part(merge.part(merge.slot_of(number)));
    __syncthreads();
    uint32_t& shared = Shared::fixed().arrival;
    if (threadIdx.x == 0) {
      __threadfence();  // the block's part is there before it arrives
      shared = atomicAdd(params_.arrivals + merge.slot_of(item.first_part), 1u + (bad ? kBadArrival : 0u));
      __threadfence();  // and if it is the last, so are the others'
    }
    __syncthreads();
    const uint32_t before = shared;
    if (before % kBadArrival != static_cast<unsigned>(item.num_lanes) - 1) return false;
    bad |= before >= kBadArrival;
    return true;
  }

  // The slots are free, and nobody has arrived: for the next tile that has them, and for the next launch.
  // Whoever arrives there next waits for the first slot, which thread 0 gives back after its arrivals.
  __device__ __forceinline__ void give_back_slots(const AttentionItem& item, const Merge& merge) const {
    if (threadIdx.x == 0) params_.arrivals[merge.slot_of(item.first_part)] = 0;
    if (!reuses_slots_) return;
    __syncthreads();  // all parts have been read
    for (int lane = static_cast<int>(threadIdx.x); lane < item.num_lanes; lane += kThreads) {
      const unsigned long long number = item.first_part + static_cast<unsigned>(lane);
      const auto uses = static_cast<uint32_t>(number / static_cast<unsigned>(params_.num_slots));
      store_release(params_.slot_uses + merge.slot_of(number), uses + 1);
    }
  }

  // The new tokens whose first q head is in this tile: one block writes each of them.
  __device__ __forceinline__ void append_rows(const TileRows& rows) const {
    if (!batch_.new_k.data) return;
    const AttentionItem& item = rows.item;
    const int group = params_.group, first = item.tile * kTileRows;
    const int end = min(item.num_queries, (first + kTileRows + group - 1) / group);
#pragma unroll 1
    for (int query = (first + group - 1) / group; query < end; ++query) {
      const int position = rows.new_begin + query;
      const int32_t* const table = batch_.block_table + item.sequence * batch_.block_table_stride;
      append_head<T, C>(batch_, int64_t{item.first_row} + query, position,
                        table[position / batch_.block_size], item.kv_head, static_cast<int>(threadIdx.x),
                        kThreads);
    }
  }

  const AttentionKernelParams& params_;
  const PagedBatch& batch_;
  const bool reuses_slots_;
};

// Two blocks fit a multiprocessor: 65,536 registers are 256 for each of their threads.
template <class T, class C, int kHeadDim, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize, 2)
    attention_kernel(const __grid_constant__ AttentionKernelParams params) {
  AttentionWork<AttentionShared<T, C, kHeadDim, kWarps>> work(params);
  AttentionBlock<T, C, kHeadDim, kWarps> block(params, work.reuses_slots());
#pragma unroll 1
  while (const AttentionItem* const item = work.next()) block.run(*item);
  work.finish();
}

}  // namespace tokenstep::cuda
