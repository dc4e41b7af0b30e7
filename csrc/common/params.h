// One plain struct per op: what a kernel sees, on the CPU and on the GPU. No Python, no framework, no
// ownership. Strides count elements. A null pointer means that the feature is off. B rows of a batch, V
// tokens of the vocabulary.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace tokenstep {

// ---- sampling -------------------------------------------------------------------------------------------
constexpr int kMaxVocabSize = 1 << 18;
constexpr int kMaxTopLogprobs = 20;

enum class SampleStatus : int32_t {
  kSampled = 0,
  kBadLogit = 1,      // NaN or +inf among the row's logits
  kNoToken = 2,       // no token left with a finite value
  kBadParameter = 3,  // a parameter that only the device knew is out of range
};

enum class LogprobsMode : int32_t { kRaw, kProcessed };

// Whose meaning the parameters have: that of docs/sampling.md, or another engine's (sampling_rules.h).
enum class Semantics : int32_t { kTokenstep, kVllm, kTransformers, kLlamaCpp };
constexpr int kMaxPenaltyLastN = 1 << 20;

// Sampling parameters of one row (or of one slot of a Sampler), in the memory of the device that samples, as
// its lists are: history (unique ids of prompt and output) and logit bias (unique ids, ascending).
struct alignas(16) RowParams {
  float temperature = 1.0f;
  float top_p = 1.0f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
  float frequency_penalty = 0.0f;
  float presence_penalty = 0.0f;
  int32_t top_k = 0;       // <= 0: off
  uint32_t substream = 0;  // Philox counter, with position
  uint64_t seed = 0;       // Philox key
  uint64_t position = 0;   // index of the output token; a sampled row moves on by one
  int32_t* history_ids = nullptr;
  uint32_t* history_counts = nullptr;  // occurrences (sampling_history.h), see history_capacity
  int32_t* bias_ids = nullptr;
  float* bias_values = nullptr;
  int32_t history_size = 0;
  // 0: the history is only read, and counts lie beside the ids, which ascend on a GPU (kernels search them).
  // Else sampled tokens join it, history_ids has room for so many, and history_counts is dense: [V], by token
  // id.
  int32_t history_capacity = 0;
  int32_t bias_size = 0;
  int32_t num_logprobs = -1;  // top log probabilities wanted for this row, 0: the token's own only; -1: none
  // llama.cpp's penalties, which count the last so many tokens of prompt and output together, or all of them
  // (-1); 0: everybody else's. Of a Sampler's slot the window moves on with its tokens (sampling_history.h).
  int32_t penalty_last_n = 0;
  int32_t window_at = 0;  // where in the window the next token goes, in place of the oldest
  // [penalty_last_n] tokens, -1: none yet; behind them [V], the place of an id in its list.
  int32_t* window = nullptr;
};
static_assert(sizeof(RowParams) == 112);

struct SampleParams {
  const void* logits;  // [B, V] float32, float16 or bfloat16
  int64_t logits_stride;
  DType logits_dtype;
  int32_t num_rows;    // B
  int32_t vocab_size;  // V <= kMaxVocabSize

  RowParams* rows;           // [num_slots]
  int32_t num_slots;         // a row whose slot is not one of them is kBadParameter
  const int32_t* row_slots;  // [B] slot of each row; null: row b is slot b

  const uint32_t* token_bitmask;  // [B, ceil(V / 32)]: bit i % 32 of word i / 32 allows token i
  int64_t token_bitmask_stride;

  Semantics semantics;

  int64_t* tokens;  // [B]
  int32_t* status;  // [B], SampleStatus

  LogprobsMode logprobs_mode;
  int32_t
      num_top_logprobs;  // N <= kMaxTopLogprobs, the width of the outputs; a row may want fewer (RowParams)
  float* logprobs;       // [B]; null: no row wants log probabilities
  int32_t* ranks;        // [B], 1 is the most likely
  int64_t* top_tokens;   // [B, N]
  float* top_logprobs;   // [B, N]
};

// ---- what a device is told beside its steps -------------------------------------------------------------
// One slot of a Sampler gets a request, or none: its memory is the device's, the lists are read once.
struct SlotUpdate {
  RowParams* slot;
  RowParams row;  // the new content, pointing at the slot's own lists
  const int32_t* history_ids;
  const uint32_t* history_counts;  // beside the ids
  const int32_t* bias_ids;
  const float* bias_values;
  const int32_t* window_tokens;  // the last tokens, in order
  int32_t window_size;
};

// Sampling parameters that only the device knows, one array per parameter, as they go into rows.
enum class RowField : int32_t {
  kTemperature,
  kTopP,
  kMinP,
  kRepetitionPenalty,
  kFrequencyPenalty,
  kPresencePenalty,
  kTopK,
  kSubstream,
  kSeed,
  kPosition,
};
constexpr int kNumRowFields = 10;

struct RowFieldArray {
  const void* data;  // [B]; null: the rows have it already
  int64_t stride;
  DType dtype;  // float32, float64, int32 or int64; of whole numbers int32, int64, uint32 or uint64
};

struct RowFieldsParams {
  RowParams* rows;  // [B]
  int32_t num_rows;
  RowFieldArray fields[kNumRowFields];  // by RowField
};

// Steps 0-8 alone: float32 logits, -inf where cut; a greedy row keeps its arg max alone.
struct ApplyLogitsParams {
  SampleParams sample;  // its outputs but `status` are unused
  float* out;           // [B, V]
  int64_t out_stride;
};

// ---- paged attention ------------------------------------------------------------------------------------
constexpr int kMaxHeadDim = 256;

// A KV cache in pages: [num_blocks, block_size, num_kv_heads, head_dim] in any strides with head_dim
// contiguous.
struct CacheView {
  void* data;
  int64_t block_stride, token_stride, head_stride;
};

// Rows of heads: [T, heads, head_dim], head_dim contiguous.
struct RowsView {
  void* data;
  int64_t row_stride, head_stride;
};

struct RopeParams {
  const float* cos;  // [max_position, rotary_dim / 2]; null: no rotation
  const float* sin;
  int32_t max_position;
  int32_t rotary_dim;  // <= head_dim, even; the rest of a head passes unrotated
  bool interleaved;    // pairs (2i, 2i + 1) instead of (i, i + rotary_dim / 2)
};

enum class AttentionStatus : int32_t {
  kOk = 0,
  kBadBlock = 1,  // a block id outside [0, num_blocks) where the sequence needs a block
  kBadLength =
      2,  // seq_lens negative, beyond the block table or the rope table, or less than the sequence's queries
};

// Sequences in a paged cache, and the rows of this step: what append_kv takes (it rotates q in place), and
// the part of paged_attention's input that says where keys and values are.
struct PagedBatch {
  DType dtype;        // of q and of new rows: float32, float16 or bfloat16
  DType cache_dtype;  // the same, or float8_e4m3 or int8 with per-head scales

  int32_t num_queries;    // T, rows of q and of new_k, new_v over all sequences
  int32_t num_sequences;  // R
  int32_t num_heads;      // Hq; 0: no q
  int32_t num_kv_heads;   // Hkv
  int32_t head_dim;       // D: a multiple of 8 up to 256
  int32_t block_size;
  int32_t num_blocks;
  int32_t max_blocks;     // width of the block table
  int32_t max_query_len;  // no sequence has more queries

  RowsView q;             // [T, Hq, D]; data null: none
  RowsView new_k, new_v;  // [T, Hkv, D] rows to append; data null: none
  RopeParams rope;        // rotates q and new_k at their positions

  CacheView k_cache, v_cache;
  const int32_t* block_table;  // [R, max_blocks]
  int64_t block_table_stride;
  const int32_t* seq_lens;     // [R], new tokens included
  const int32_t* query_start;  // [R + 1] offsets into the T rows; null: one query per sequence
  const float* k_scale;        // [Hkv] of a quantised cache
  const float* v_scale;

  int32_t* status;  // [R], AttentionStatus; null: not wanted
};

struct AttentionParams {
  PagedBatch batch;
  RowsView out;  // [T, Hq, D] of batch.dtype
  float* lse;    // [T, Hq] natural log, sinks included; null: not wanted

  float scale;
  float softcap;              // 0: off. score = softcap * tanh(score / softcap)
  int32_t window;             // keys at positions > query position - window; 0: unlimited
  const float* alibi_slopes;  // [Hq]
  const float* sinks;         // [Hq] one more score per head, without a value

  void* workspace;  // of a device; see its kernels
  int64_t workspace_bytes;
};

// Attention over parts of the keys, merged by their log-sum-exp: [S, T, Hq, D] and [S, T, Hq] -> [T, Hq, D]
// and [T, Hq].
struct MergeParams {
  DType dtype;
  int32_t num_parts;    // S
  int32_t num_queries;  // T
  int32_t num_heads;    // Hq
  int32_t head_dim;     // D
  const void* outs;
  int64_t part_stride, row_stride, head_stride;  // of outs
  const float* lses;
  int64_t lse_part_stride, lse_row_stride, lse_head_stride;
  void* out;  // contiguous, like lse
  float* lse;
};

}  // namespace tokenstep
