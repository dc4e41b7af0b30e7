// Raw logits to token in one launch: steps 0-10 of a row, with log probabilities and the update of its history.
//
// Never materialised: edited logits, probabilities, masks or counts over the vocabulary, sorted tokens. A group
// of blocks takes a row (sample_group.cuh), and after it the next:
//
//   prefetch_row, load_params   the row moves to L2 while its parameters arrive
//   make_live_map               V/8 bits in shared memory: neither masked nor edited
//   find_row_max                the one pass over the row's V logits; one maximum per thread stays
//   choose                      a threshold from these maxima; the tokens beyond it, read again from L2;
//                               cuts and draw among them (sample_few.cuh), or in general (sample_cut.cuh)
//   write_logprobs              where asked for: one more pass over the row, from L2, that weighs every token
//   record_token                the token joins the row's history
//
// Bytes from memory: B * V * sizeof(logit), V/8 of a mask, the lists of edits. Barriers of the group in the usual
// case: 3 (maxima, lists, end), one more with an outcome that all blocks need. What a row gives depends on
// none of: the number of blocks or threads, the other rows, the order in which anything runs. Sums are integers
// (numerics.h), the rest are maxima and comparisons.
#pragma once
#include "cuda/sample_logprobs.cuh"

namespace tokenstep::cuda {

// Brings the row's parameters and maxima together. Not kSampled: the row has no token, and why.
template <class Block>
__device__ __forceinline__ SampleStatus scan_row(Block& block, int index, ThreadScan& scan, ColumnMaxima& maxima,
                                                 Plan& plan, View& view) {
  block.locate(index);
  prefetch_row(block);
  load_params(block);
  __syncthreads();
  if (!parameters_in_range(block.row())) return SampleStatus::kBadParameter;
  block.adopt_params();
  make_live_map(block);
  scan = find_row_max(block);
  block.sync_group();
  maxima = read_maxima(block, false);
  const uint32_t largest = largest_key(block, maxima);
  if (largest == kBadKey) return SampleStatus::kBadLogit;
  if (largest <= kMinusInfinityKey) return SampleStatus::kNoToken;
  view = View{false, false, 0.0f};
  return make_plan(block, from_ordered_bits(largest), plan, view) ? SampleStatus::kSampled : SampleStatus::kNoToken;
}

template <class Block>
__device__ __forceinline__ void sample_row(Block& block, int index) {
  const SampleParams& p = block.p;
  const bool leads = block.group.rank == 0 && block.thread == 0;
  ThreadScan scan;
  ColumnMaxima maxima;
  Plan plan;
  View view;
  const SampleStatus status = scan_row(block, index, scan, maxima, plan, view);
  Outcome outcome;
  if (status == SampleStatus::kSampled) {
    bool cut_is_known;
    outcome = choose<Block, true>(block, view, plan, scan, maxima, cut_is_known);
    if (wants_logprobs(p, block.row()))
      write_logprobs(block, view, plan, scan, outcome);
    else if (leads)
      write_no_logprobs(p, index);
    if (leads) {
      p.tokens[index] = outcome.token;
      p.status[index] = static_cast<int32_t>(status);
    }
  } else if (leads) {
    write_failure(p, index, status);
  }
  block.sync_group();  // nobody reads this block's box, the row's lists or its parameters any more
  if (leads && status == SampleStatus::kSampled)
    record_token(p.rows[p.row_slots ? p.row_slots[index] : index], outcome.token);
}

// grid = groups * group size
template <class Logit, int kThreads, GroupMode kMode>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(const __grid_constant__ SampleParams p, const __grid_constant__ GroupArgs args) {
  if constexpr (!kExistsHere<kMode>) return;
  Block<Logit, kThreads, kMode, false> block(p, args);
  const int groups = static_cast<int>(gridDim.x) / block.group.size;
#pragma unroll 1
  for (int row = block.group.index; row < p.num_rows; row += groups) sample_row(block, row);
}

}  // namespace tokenstep::cuda
