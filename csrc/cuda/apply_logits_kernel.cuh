// Steps 0-8 in one launch: the float32 logits of what is left, -inf elsewhere. The row is read as the sampler
// reads it (sample_kernel.cuh), and once more to be written; it may be written to where it lies.
#pragma once
#include "cuda/sample_kernel.cuh"

namespace tokenstep::cuda {

struct OutRow {
  float* values;
  bool kept;  // false: the row has no token, all is -inf
  Cut cut;
  __device__ __forceinline__ float operator()(float value, int32_t id) const {
    return kept && is_kept(value, id, cut) ? value : -kInfinity;
  }
};

// The tokens of a unit that are not edited. Edited ones keep their logit for write_edits(), which may lie there.
template <class Block>
__device__ __forceinline__ void write_unit(const Block& block, const OutRow& out, int at) {
  using Logit = typename Block::Logit;
  constexpr int kVectors = Block::kUnit / 4;
  const Unit unit = block.load(at);
  const uint32_t live = block.live_tokens(at);
  const int32_t first_id = block.id_of(at, 0);
  float* to = out.values + first_id;
  if (live == Block::kAllTokens && block.is_whole(at) && reinterpret_cast<uintptr_t>(to) % sizeof(float4) == 0) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int place = v * 4 + i;
        const float x = token_of_word<Logit>(unit.word[place / kWordTokens<Logit>], place % kWordTokens<Logit>);
        values[i] = out(apply_temperature(x, block.scale), first_id + place);
      }
      reinterpret_cast<float4*>(to)[v] = {values[0], values[1], values[2], values[3]};
    }
    return;
  }
  for_each_token<Logit>(unit, [&](float x, int place) {
    const int32_t id = first_id + place;
    if (id < 0 || id >= block.p.vocab_size) return;
    if (live >> place & 1)
      to[place] = out(apply_temperature(x, block.scale), id);
    else if (!block.allows(id))
      to[place] = -kInfinity;
  });
}

// Edited tokens of this block's share.
template <class Block>
__device__ __forceinline__ void write_edits(const Block& block, const OutRow& out) {
#pragma unroll 1
  for (int entry = block.thread; entry < block.num_edits; entry += Block::kThreads) {
    const bool is_bias = entry < block.num_biases;
    int32_t id = is_bias ? block.row().bias_ids[entry] : block.row().history_ids[entry - block.num_biases];
    const int unit = (id + block.shift) / Block::kUnit;
    float value;
    if (unit >= block.first_unit && unit < block.end_unit && block.edit(entry, id, value))
      out.values[id] = out(apply_temperature(value, block.scale), id);
  }
}

template <class Block>
__device__ __forceinline__ void apply_logits_to_row(Block& block, const ApplyLogitsParams& params, int index) {
  ThreadScan scan;
  ColumnMaxima maxima;
  Plan plan;
  View view;
  const SampleStatus status = scan_row(block, index, scan, maxima, plan, view);
  Outcome outcome;
  if (status == SampleStatus::kSampled) {
    bool cut_is_known;
    outcome = choose<Block, false>(block, view, plan, scan, maxima, cut_is_known);
    if (!cut_is_known) share_outcome(block, outcome);
  } else {
    block.num_biases = block.num_edits = 0;
    block.has_live_map = false;
  }
  block.sync_group();  // all have read what they need of the row
  const OutRow out = {params.out + index * params.out_stride, status == SampleStatus::kSampled, outcome.cut};
#pragma unroll 1
  for (int unit = block.first_unit + block.thread; unit < block.end_unit; unit += Block::kThreads)
    write_unit(block, out, unit);
  write_edits(block, out);
  if (block.group.rank == 0 && block.thread == 0) block.p.status[index] = static_cast<int32_t>(status);
  __syncthreads();  // before the next row's parameters come
}

template <class Logit, int kThreads, GroupMode kMode>
__global__ void __launch_bounds__(kThreads)
    apply_logits_kernel(const __grid_constant__ ApplyLogitsParams params, const __grid_constant__ GroupArgs args) {
  if constexpr (!kExistsHere<kMode>) return;
  Block<Logit, kThreads, kMode, true> block(params.sample, args);
  const int groups = static_cast<int>(gridDim.x) / block.group.size;
#pragma unroll 1
  for (int row = block.group.index; row < params.sample.num_rows; row += groups)
    apply_logits_to_row(block, params, row);
}

}  // namespace tokenstep::cuda
