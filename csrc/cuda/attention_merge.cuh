// From partial results to rows of out and lse: warps of a block, then lanes of a tile, in fixed order.
//
// A partial result is 16 rows of outputs, not yet divided, then 16 maxima, 16 sums. Lanes that other blocks
// computed come through the workspace (L2); the block whose arrival completes them merges them. Lanes of one
// block come one after another. Both add them by RowTotal::add, so that the bits are the same.
#pragma once
#include "cuda/attention_slice.cuh"

namespace tokenstep::cuda {

template <class T, class C, int kHeadDim, int kWarps>
class AttentionMerge {
  using Shared = AttentionShared<T, C, kHeadDim, kWarps>;
  static constexpr int kThreads = Shared::kThreads;
  static constexpr int kWarpRow = Shared::kWarpRow;
  static constexpr int kPartFloats = kTileRows * part_floats_per_row(kHeadDim);

 public:
  __device__ __forceinline__ AttentionMerge(const TileRows& rows)
      : rows_(rows), params_(rows.params), thread_(static_cast<int>(threadIdx.x)) {}

  // ---- warps of this block --------------------------------------------------------------------------------
  // The rings are no longer used by this warp; they may be by others until the barrier. Returns whether
  // `found` is true in some thread.
  __device__ __forceinline__ bool leave_warp(RunningRows& running, const SliceOutputs<kHeadDim>& outputs,
                                             bool found) const {
    running.join_lanes();
    __syncthreads();
    const int warp = warp_id(), lane = lane_id();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp * kTileRows + lane / 4 + 8 * r;
      float* const out = warp_outputs() + row * kWarpRow;
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step)
        Fragments<T, C, kHeadDim>::store_outputs(outputs[2 * step], outputs[2 * step + 1], r, lane,
                                                 out + 16 * step);
      if (lane % 4 == 0) {
        warp_max()[row] = running.max[r];
        warp_sum()[row] = running.sum[r];
      }
    }
    return __syncthreads_or(found);
  }

  // The row's maximum and sum over the warps, by one thread; factors are left for joined_output.
  __device__ __forceinline__ RowTotal join_row(int row) const {
    RowTotal total;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp)
      total.max = fmaxf(total.max, warp_max()[warp * kTileRows + row]);
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const int index = warp * kTileRows + row;
      const float factor = exp2_approx(warp_max()[index] - reference_of(total.max));
      warp_factor()[index] = factor;
      total.sum = __fmaf_rn(warp_sum()[index], factor, total.sum);
    }
    return total;
  }
  __device__ __forceinline__ float joined_output(int row, int column) const {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const int index = warp * kTileRows + row;
      sum = __fmaf_rn(warp_outputs()[index * kWarpRow + column], warp_factor()[index], sum);
    }
    return sum;
  }

  // ---- a tile of one lane: straight to the results --------------------------------------------------------
  __device__ __forceinline__ void finish_from_warps() const {
    if (thread_ < rows_.count) finish_row(thread_, join_row(thread_));
    __syncthreads();
    for_each_output([&](int row, int column) { write_output(row, column, joined_output(row, column)); });
  }

  // ---- a lane among others: to the workspace --------------------------------------------------------------
  __device__ __forceinline__ void leave_part(float* part) const {
    if (thread_ < rows_.count) {
      const RowTotal total = join_row(thread_);
      part[kTileRows * kHeadDim + thread_] = total.max;
      part[kTileRows * kHeadDim + kTileRows + thread_] = total.sum;
    }
    __syncthreads();
    for_each_output([&](int row, int column) { part[row * kHeadDim + column] = joined_output(row, column); });
  }

  __device__ __forceinline__ float* part(int slot) const {
    return params_.parts + slot * int64_t{kPartFloats};
  }
  __device__ __forceinline__ int slot_of(unsigned long long number) const {
    return static_cast<int>(number % static_cast<unsigned>(params_.num_slots));
  }
  // Lanes of a tile have consecutive numbers; `first_slot` is that of the first.
  __device__ __forceinline__ int slot_of_lane(int first_slot, int lane) const {
    const int slot = first_slot + lane;
    return slot < params_.num_slots ? slot : slot - params_.num_slots;
  }
  // Until what was in the slot before has been merged. By one thread.
  __device__ __forceinline__ void wait_for_slot(unsigned long long number) const {
    const auto uses = static_cast<uint32_t>(number / static_cast<unsigned>(params_.num_slots));
    while (load_acquire(params_.slot_uses + slot_of(number)) != uses) spin_pause();
  }

  // All lanes have left their parts: merges them, from lane 0 on (chunks are lanes modulo kMaxLanes).
  __device__ __forceinline__ void finish_from_parts() const {
    const AttentionItem& item = rows_.item;
    float* const numbers =
        reinterpret_cast<float*>(Shared::rings());  // [lane][max or keep, sum or take][row]
    const int first_slot = slot_of(item.first_part);
    const auto part_in_order = [&](int index) {
      return part(slot_of_lane(first_slot, lane_in_order(item, index)));
    };
    for (int i = thread_; i < item.num_lanes * 2 * kTileRows; i += kThreads) {
      const int lane = i / (2 * kTileRows), row = i % kTileRows;
      if (row < rows_.count)
        numbers[i] = __ldcg(part_in_order(lane) + kTileRows * kHeadDim + i % (2 * kTileRows));
    }
    __syncthreads();
    if (thread_ < rows_.count) {
      RowTotal total;
      for (int lane = 0; lane < item.num_lanes; ++lane) {
        float* const max = numbers + lane * 2 * kTileRows + thread_;
        float* const sum = max + kTileRows;
        float keep, take;
        total.add(*max, *sum, keep, take);
        *max = keep;
        *sum = take;
      }
      finish_row(thread_, total);
    }
    __syncthreads();
    for_each_output([&](int row, int column) {
      float output = 0.0f;
#pragma unroll 4
      for (int lane = 0; lane < item.num_lanes; ++lane) {
        const float* const factors = numbers + lane * 2 * kTileRows + row;
        output = __fmaf_rn(__ldcg(part_in_order(lane) + row * kHeadDim + column), factors[kTileRows],
                           output * factors[0]);
      }
      write_output(row, column, output);
    });
  }

  // ---- lanes one after another in this block --------------------------------------------------------------
  __device__ __forceinline__ void clear_total() const {
    for_each_output([&](int row, int column) { Shared::total()[row * kHeadDim + column] = 0.0f; });
    if (thread_ < kTileRows) {
      totals().max[thread_] = kMinusInfinity;
      totals().sum[thread_] = 0.0f;
    }
  }
  __device__ __forceinline__ void add_warps_to_total() const {
    if (thread_ < rows_.count) {
      const RowTotal part = join_row(thread_);
      RowTotal total = {totals().max[thread_], totals().sum[thread_]};
      total.add(part.max, part.sum, totals().keep[thread_], totals().take[thread_]);
      totals().max[thread_] = total.max;
      totals().sum[thread_] = total.sum;
    }
    __syncthreads();
    for_each_output([&](int row, int column) {
      float& output = Shared::total()[row * kHeadDim + column];
      output = __fmaf_rn(joined_output(row, column), totals().take[row], output * totals().keep[row]);
    });
    __syncthreads();
  }
  __device__ __forceinline__ void finish_total() const {
    if (thread_ < rows_.count) finish_row(thread_, {totals().max[thread_], totals().sum[thread_]});
    __syncthreads();
    for_each_output(
        [&](int row, int column) { write_output(row, column, Shared::total()[row * kHeadDim + column]); });
  }

  // ---- rows without a result ------------------------------------------------------------------------------
  __device__ __forceinline__ void clear_rows() const {
    if (thread_ < rows_.count) write_lse(thread_, kMinusInfinity);
    for_each_output([&](int row, int column) { *output(row, column) = narrow<T>(0.0f); });
  }

 private:
  // Each thread takes the same elements whoever calls.
  template <class F>
  __device__ __forceinline__ void for_each_output(const F& f) const {
#pragma unroll 1
    for (int i = thread_; i < rows_.count * kHeadDim; i += kThreads) {
      const int row = i / kHeadDim, column = i % kHeadDim;
      if (column < params_.op.batch.head_dim) f(row, column);
    }
  }

  // Sink and lse; the factors of the row's outputs are left in the totals.
  __device__ __forceinline__ void finish_row(int row, RowTotal total) const {
    const float* const sinks = params_.op.sinks;
    totals().keep[row] = sinks ? total.add_sink(sinks[rows_.head_of_row(row)]) : 1.0f;
    totals().take[row] = total.sum == 0.0f ? 1.0f : total.sum;  // the divisor
    write_lse(row, total.log_sum_exp());
  }
  __device__ __forceinline__ void write_lse(int row, float lse) const {
    if (params_.op.lse)
      params_.op.lse[rows_.row_of_q(row) * params_.op.batch.num_heads + rows_.head_of_row(row)] = lse;
  }
  __device__ __forceinline__ T* output(int row, int column) const {
    return head_of<T>(params_.op.out, rows_.row_of_q(row), rows_.head_of_row(row)) + column;
  }
  __device__ __forceinline__ void write_output(int row, int column, float sum) const {
    float result = sum * totals().keep[row] / totals().take[row];
    if constexpr (sizeof(C) == 1) result *= params_.op.batch.v_scale[rows_.item.kv_head];
    *output(row, column) = narrow<T>(result + 0.0f);  // no negative zero
  }

  __device__ __forceinline__ static RowTotals& totals() { return Shared::fixed().totals; }
  __device__ __forceinline__ static float* warp_outputs() {
    return reinterpret_cast<float*>(Shared::rings());
  }
  __device__ __forceinline__ static float* warp_max() {
    return warp_outputs() + kWarps * kTileRows * kWarpRow;
  }
  __device__ __forceinline__ static float* warp_sum() { return warp_max() + kWarps * kTileRows; }
  __device__ __forceinline__ static float* warp_factor() { return warp_sum() + kWarps * kTileRows; }

  const TileRows& rows_;
  const AttentionKernelParams& params_;
  const int thread_;
};

}  // namespace tokenstep::cuda
