// What the pieces of the sampler hand to one another, and how a block's shared memory is laid out.
#pragma once
#include "common/params.h"
#include "common/sampling_rules.h"
#include "cuda/logits.cuh"

namespace tokenstep::cuda {

constexpr int kMaxGroupSize = 8;    // blocks that share a row; the largest cluster that every part supports
constexpr int kBins = 1024;         // of a histogram
constexpr int kTokensPerBin = 256;  // of one by place in the row; the last bin has up to 7 more
static_assert(kBins * kTokensPerBin >= kMaxVocabSize);
// Bins of values: 36 per nat below the maximum. The last one is open: it begins at 28.4 nats, where every
// weight is 0 already (2^40 exp(-27.8) < 1).
constexpr float kBinsPerNat = 36.0f;
constexpr int kListSize = 2048;  // candidates that a block holds
constexpr int kFewTokens = 128;  // so many are ranked by comparing all pairs, in one block

enum class GroupMode {
  kSolo,     // one block a row
  kCluster,  // a thread-block cluster, distributed shared memory (sm_90 and later)
  kSoft,     // blocks of a cooperative launch, global memory
};

struct Candidate {
  float value;
  int32_t id;
};

// Which values a step looks at, and which of them are left.
struct View {
  bool raw;                                 // step 0; else step 5 (step 4 in a greedy row)
  bool listed;                              // all that may be left is in the blocks' lists
  float x_max;                              // largest value
  int last_bin = kBins - 1;                 // the lists hold bins up to this one
  Cut cut = {-0x1.fffffep127f, INT32_MAX};  // at first: everything finite
};

// What the draw found out. Only the group's first block has it, until it is shared.
struct Outcome {
  int32_t token = -1;
  int32_t rank = 1;    // among what is left
  uint64_t total = 0;  // weight of what is left
  Cut cut;             // the last token that is left
};

// What a block shows to the others of its group. Two copies of what is reused within a row: one may still be
// read by others while the next is written, with one barrier between a write and its reads (Block::share).
template <int kThreads>
struct Box {
  uint32_t raw_max[kThreads], edited_max[kThreads];  // of each thread's tokens, as ordered bits
  uint32_t histogram[2][2 * kBins];
  uint32_t mail[2][8];
  Candidate few[2][kFewTokens];
};

struct SoftBarrier {  // zero at first; counts in generations, so that it is never reset
  uint32_t arrived, generation;
};

// The blocks of one launch, beside its params.
struct GroupArgs {
  int32_t size;           // blocks per row
  void* boxes;            // kSoft: one Box per block
  SoftBarrier* barriers;  // kSoft: one per group
};

// What a block is at, for functions out of line.
struct Task {
  const SampleParams* p;
  const GroupArgs* args;
  int row;
};

template <int kThreads, GroupMode kMode>
struct SharedState {
  Task task;
  RowParams params;
  Unit row_ends[2];           // the first and the last unit of the row, with -inf outside of it
  Candidate edits[kThreads];  // of each thread the first of its edits, after step 4; id -1: none
  uint32_t histogram_low[kBins], histogram_high[kBins];  // 64-bit shared atomics would be loops
  Candidate list[kListSize];
  Candidate few[kFewTokens];
  uint64_t few_weight[kFewTokens], weight_before[kFewTokens];
  int32_t few_rank[kFewTokens];
  uint64_t warp_sums[2][kWarpSize];
  uint32_t warp_keys[kWarpSize];
  uint64_t above_crossing;
  int32_t crossing_bin;
  Cut found_cut;
  int32_t found_token, found_rank;
  uint32_t list_size, num_hits;
  uint32_t least_key, largest_key;
  uint16_t hits[kThreads];
  Box<kThreads> box[kMode == GroupMode::kSoft ? 0 : 1];
  // Then the live map: one bit per token of the block's share of the row.
};

// Units that a row touches at most: one that begins within a unit needs one more.
template <class Logit>
__host__ __device__ constexpr int units_of(int vocab_size) {
  return (vocab_size + kUnitTokens<Logit> - 1) / kUnitTokens<Logit> + 1;
}
// Whole warps of units, so that 32 neighbours lie in one bin by place.
template <class Logit>
__host__ __device__ constexpr int units_per_block(int vocab_size, int group_size) {
  const int share = (units_of<Logit>(vocab_size) + group_size - 1) / group_size;
  return (share + kWarpSize - 1) / kWarpSize * kWarpSize;
}
template <class Logit, int kThreads, GroupMode kMode>
constexpr size_t shared_bytes(int vocab_size, int group_size) {
  return sizeof(SharedState<kThreads, kMode>) +
         static_cast<size_t>(units_per_block<Logit>(vocab_size, group_size)) * kUnitTokens<Logit> / 8;
}

}  // namespace tokenstep::cuda
