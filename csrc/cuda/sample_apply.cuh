// The output of apply_logits: the float32 logits of what is left, -inf elsewhere. They may be written to
// where the logits lie.
#pragma once
#include "cuda/sample_choose.cuh"

namespace tokenstep::cuda {

struct OutRow {
  float* values;
  bool kept;  // false: the row has no token, all is -inf
  Cut cut;
  // What stands for a value after step 4.
  template <class Block>
  __device__ __forceinline__ float processed(const Block& block, float x, int32_t id) const {
    const float value = block.tempered(x);
    return kept && is_kept(value, id, cut) ? block.tempered_late(value) : -kInfinity;
  }
};

// The tokens of a unit that are not edited. Edited ones keep their logit for write_edits(), which may lie
// there.
template <class Block>
__device__ __forceinline__ void write_unit(const Block& block, const OutRow& out, int at) {
  using Logit = typename Block::Logit;
  constexpr int kVectors = Block::kUnit / 4;
  const Unit unit = block.load(at);
  const uint32_t live = block.live_tokens(at);
  const int32_t first_id = block.id_of(at, 0);
  float* to = out.values + first_id;
  if (live == Block::kAllTokens && block.is_whole(at) &&
      reinterpret_cast<uintptr_t>(to) % sizeof(float4) == 0) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int place = v * 4 + i;
        const float x =
            token_of_word<Logit>(unit.word[place / kWordTokens<Logit>], place % kWordTokens<Logit>);
        values[i] = out.processed(block, x, first_id + place);
      }
      reinterpret_cast<float4*>(to)[v] = {values[0], values[1], values[2], values[3]};
    }
    return;
  }
  for_each_token<Logit>(unit, [&](float x, int place) {
    const int32_t id = first_id + place;
    if (id < 0 || id >= block.p.vocab_size) return;
    if (live >> place & 1)
      to[place] = out.processed(block, x, id);
    else if (!block.edited_row().allows(id))
      to[place] = -kInfinity;
  });
}

// Edited tokens of this block's share.
template <class Block>
__device__ __forceinline__ void write_edits(const Block& block, const OutRow& out) {
#pragma unroll 1
  for (int entry = block.thread; entry < block.num_edits; entry += Block::kThreads) {
    const bool is_bias = entry < block.num_biases;
    const int32_t id =
        is_bias ? block.row().bias_ids[entry] : block.row().history_ids[entry - block.num_biases];
    const int unit = (id + block.shift) / Block::kUnit;
    if (unit < block.first_unit || unit >= block.end_unit) continue;
    const Candidate token = edited_token(block.edited_row(), entry);
    if (token.id >= 0) out.values[id] = out.processed(block, token.value, id);
  }
}

// This block's share of the row, once all blocks have read what they need of it.
template <class Block>
__device__ __noinline__ void write_row(BlockState state, OutRow out) {
  Block block = resume<Block>(state);
  if (!out.kept) {  // parameters out of range say nothing of edits
    block.num_biases = block.num_edits = 0;
    block.has_live_map = false;
  }
#pragma unroll 1
  for (int unit = block.first_unit + block.thread; unit < block.end_unit; unit += Block::kThreads)
    write_unit(block, out, unit);
  __syncthreads();  // edits lie in units that others read
  write_edits(block, out);
  __syncthreads();  // before the next row's parameters come
}

}  // namespace tokenstep::cuda
