// Raw logits to token in one launch: steps 0-10 of a row, with log probabilities and the update of its
// history; or steps 0-8 alone, for apply_logits.
//
// Never materialised: edited logits, probabilities, masks or counts over the vocabulary, sorted tokens. A
// group of blocks takes a row (sample_group.cuh), and after it the next:
//
//   prefetch_row, load_params   the row moves to L2 while its parameters arrive
//   make_live_map               V/8 bits in shared memory: neither masked nor edited
//   find_row_max                the one pass over the row's V logits; one maximum per thread stays
//   choose                      a threshold from these maxima; the tokens beyond it, read again from L2;
//                               cuts and draw among them (sample_few.cuh), or in general (sample_cut.cuh)
//   write_logprobs              where asked for: one more pass over the row, from L2, that weighs every token
//   record_token                the token joins the row's history; or
//   write_row                   the row is read once more from L2, and written
//
// Bytes from memory: B * V * sizeof(logit), V/8 of a mask, the lists of edits. Barriers of the group in the
// usual case: 3 (maxima, lists, end), one more with an outcome that all blocks need. What a row gives depends
// on none of: the number of blocks or threads, the other rows, the order in which anything runs. Sums are
// integers (numerics.h), the rest are maxima and comparisons.
#pragma once
#include "cuda/sample_apply.cuh"
#include "cuda/sample_logprobs.cuh"

namespace tokenstep::cuda {

// What the one kernel of both ops gets; `out` null: a token is drawn.
using SampleKernelParams = ApplyLogitsParams;

// The row's parameters, maxima and plan. Not kSampled: the row has no token, and why.
template <class Block>
__device__ __forceinline__ SampleStatus scan_row(Block& block, int index, bool draws,
                                                 uint32_t& own_column_max, Plan& plan, View& view) {
  block.locate(index);
  prefetch_row(block);
  load_params(block);
  __syncthreads();
  if (!parameters_in_range(block.row())) return SampleStatus::kBadParameter;
  block.adopt_params();
  make_live_map(block);
  find_row_max(block);
  block.sync_group();
  own_column_max = column_max(block, false);
  const uint32_t largest = largest_key(block, own_column_max);
  if (largest == kBadKey) return SampleStatus::kBadLogit;
  if (largest <= kMinusInfinityKey) return SampleStatus::kNoToken;
  view = View{false, false, 0.0f};
  return make_plan(block, from_ordered_bits(largest), draws, plan, view) ? SampleStatus::kSampled
                                                                         : SampleStatus::kNoToken;
}

template <class Block>
__device__ __forceinline__ void sample_row(Block& block, const SampleKernelParams& params, int index) {
  const SampleParams& p = block.p;
  const bool leads = block.group.rank == 0 && block.thread == 0, draws = params.out == nullptr;
  uint32_t own_column_max;
  Plan plan;
  View view;
  SampleStatus status = scan_row(block, index, draws, own_column_max, plan, view);
  Outcome outcome;
  if (status == SampleStatus::kSampled) {
    bool cut_is_known;
    outcome = choose(block, view, plan, own_column_max, cut_is_known);
    // A slot that comes twice in a batch has lists that change while they are read. Whatever that makes of
    // its row, it is no id outside of the vocabulary.
    if (outcome.token >= p.vocab_size) outcome.token = -1;
    if (!draws) {
      if (!cut_is_known) share_outcome(block, outcome);
    } else if (wants_logprobs(p, block.row())) {
      write_logprobs(block, view, plan, outcome);
    } else if (leads) {
      write_no_logprobs(p, index);
    }
  }
  if (leads && draws && status == SampleStatus::kSampled && outcome.token < 0)
    status = SampleStatus::kBadParameter;
  const bool sampled = status == SampleStatus::kSampled;
  if (leads) {
    if (draws && !sampled) write_failure(p, index, status);
    if (draws && sampled) p.tokens[index] = outcome.token;
    p.status[index] = static_cast<int32_t>(status);
  }
  block.sync_group();  // nobody reads this block's box, the row or its lists any more
  if (draws) {
    if (leads && sampled) {
      RowParams& slot = p.rows[p.row_slots ? p.row_slots[index] : index];
      if (Block::kPreset && has_window(slot))
        record_token_in_window(slot, outcome.token);
      else
        record_token(slot, outcome.token);
    }
  } else {
    write_row<Block>(suspend(block), {params.out + index * params.out_stride, sampled, outcome.cut});
  }
}

// grid = groups * group size
template <class Logit, int kThreads, GroupMode kMode, bool kPreset>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const __grid_constant__ SampleKernelParams params, const __grid_constant__ GroupArgs args) {
  if constexpr (!kExistsHere<kMode>) return;
  Block<Logit, kThreads, kMode, kPreset> block(params.sample, args);
  const int groups = static_cast<int>(gridDim.x) / block.group.size;
#pragma unroll 1
  for (int row = block.group.index; row < params.sample.num_rows; row += groups)
    sample_row(block, params, row);
}

}  // namespace tokenstep::cuda
