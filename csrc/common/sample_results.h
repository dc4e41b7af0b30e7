// What a row's outputs hold where there is nothing to say: rows without a token, rows that did not ask for
// log probabilities, places beyond what a row asked for.
#pragma once
#include "common/sampling_rules.h"

namespace tokenstep {

TOKENSTEP_INLINE float not_a_number() { return float_from_bits(0x7fc00000u); }

// How many of the N places for top tokens this row fills: what it asked for, at most the vocabulary.
TOKENSTEP_INLINE int32_t num_top_tokens(const SampleParams& p, const RowParams& row) {
  if (!p.top_tokens || !p.top_logprobs || row.num_logprobs <= 0) return 0;
  const int32_t wanted = row.num_logprobs < p.num_top_logprobs ? row.num_logprobs : p.num_top_logprobs;
  return wanted < p.vocab_size ? wanted : p.vocab_size;
}

TOKENSTEP_INLINE bool wants_logprobs(const SampleParams& p, const RowParams& row) {
  return p.logprobs && row.num_logprobs >= 0;
}

// Places [first, N) of the row's top tokens are unused.
TOKENSTEP_INLINE void write_no_top_tokens(const SampleParams& p, int32_t index, int32_t first) {
  const int32_t width = p.num_top_logprobs;
  for (int32_t i = first; i < width; ++i) {
    if (p.top_tokens) p.top_tokens[int64_t{index} * width + i] = -1;
    if (p.top_logprobs) p.top_logprobs[int64_t{index} * width + i] = not_a_number();
  }
}

// Fewer than `wanted` tokens, `listed`, have a finite value: those at -inf follow by id.
TOKENSTEP_INLINE void write_banned_top_tokens(const SampleParams& p, int32_t index, int32_t listed,
                                              int32_t wanted) {
  int64_t* tokens = p.top_tokens + int64_t{index} * p.num_top_logprobs;
  float* logprobs = p.top_logprobs + int64_t{index} * p.num_top_logprobs;
  int32_t count = listed;
  for (int32_t id = 0; count < wanted; ++id) {
    bool is_listed = false;
    for (int32_t i = 0; i < listed; ++i) is_listed |= tokens[i] == id;
    if (is_listed) continue;
    tokens[count] = id;
    logprobs[count++] = -kInfinity;
  }
}

TOKENSTEP_INLINE void write_no_logprobs(const SampleParams& p, int32_t index) {
  if (p.logprobs) p.logprobs[index] = not_a_number();
  if (p.ranks) p.ranks[index] = 0;
  write_no_top_tokens(p, index, 0);
}

TOKENSTEP_INLINE void write_failure(const SampleParams& p, int32_t index, SampleStatus status) {
  p.tokens[index] = -1;
  p.status[index] = static_cast<int32_t>(status);
  write_no_logprobs(p, index);
}

}  // namespace tokenstep
