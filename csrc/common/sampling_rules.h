// The per-token arithmetic of sampling, steps 1-6 and 10, and the order of tokens, written once for host and
// device: fp32, each operation rounded once. How the cuts (top-k, top-p) and the draw are found is each
// backend's own code.
#pragma once
#include <cstdint>

#include "common/numerics.h"
#include "common/params.h"
#include "common/sampling_history.h"

namespace tokenstep {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kNoBias = -0.0f;  // the neutral element of fp32 addition: x + -0 is x, for -0 and +0 too

TOKENSTEP_INLINE bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

// ---- whose rules ----------------------------------------------------------------------------------------
// What engines mean by the same parameters. Every cut keeps a prefix of one order of values, so that the
// differences come down to these.
struct Rules {
  float greedy_below;  // a smaller temperature takes the arg max
  bool divides;        // step 5 is x / T; else x * (1 / T)
  bool tempers_last;   // steps 6-8 cut, and rank, by the values of step 4; only the rest is tempered
  bool keeps_ties;     // step 7 keeps whatever equals the k-th value; else exactly k
  bool min_p_last;     // step 6 comes after step 8, whose share is one of all that step 7 left
};
TOKENSTEP_INLINE constexpr Rules rules_of(Semantics semantics) {
  constexpr float kAlmostGreedy = 1e-5f, kLeastTemperature = 0x1p-149f;
  switch (semantics) {
    case Semantics::kVllm:
      return {kAlmostGreedy, true, false, true, false};
    case Semantics::kTransformers:
      return {kLeastTemperature, true, false, true, true};
    case Semantics::kLlamaCpp:
      return {kLeastTemperature, true, true, false, true};
    default:
      return {kAlmostGreedy, false, false, false, false};
  }
}

// Status 3: a row for which this is false is not sampled. Comparisons with NaN are false.
TOKENSTEP_INLINE bool parameters_in_range(const RowParams& row) {
  return row.temperature >= 0.0f && is_finite(row.temperature) && row.top_p >= 0.0f && row.top_p <= 1.0f &&
         row.min_p >= 0.0f && row.min_p <= 1.0f && row.repetition_penalty > 0.0f &&
         is_finite(row.repetition_penalty) && is_finite(row.frequency_penalty) &&
         is_finite(row.presence_penalty) && row.num_logprobs <= kMaxTopLogprobs;
}

// Does the history change any logit of this row?
TOKENSTEP_INLINE bool has_penalties(const RowParams& row) {
  return row.repetition_penalty != 1.0f || row.frequency_penalty != 0.0f || row.presence_penalty != 0.0f;
}

// Step 1: a token that the bitmask does not allow is -inf. The mask is one row's words.
TOKENSTEP_INLINE bool is_allowed(const uint32_t* mask, int32_t id) {
  return (mask[id >> 5] >> (id & 31)) & 1;
}

// Step 2: the logit bias, finite or -inf.
TOKENSTEP_INLINE float apply_bias(float x, float bias) { return add(x, bias); }

// Step 3: the repetition penalty, for ids of prompt and output.
TOKENSTEP_INLINE float apply_repetition(float x, float penalty) {
  return x > 0.0f ? div(x, penalty) : mul(x, penalty);
}

// Step 4: frequency, then presence, for ids of the output.
TOKENSTEP_INLINE float apply_frequency(float x, float penalty, uint32_t count) {
  return sub(x, mul(penalty, static_cast<float>(count)));
}
TOKENSTEP_INLINE float apply_presence(float x, float penalty) { return sub(x, penalty); }
// llama.cpp adds the two up first.
TOKENSTEP_INLINE float apply_both(float x, const RowParams& row, uint32_t count) {
  return sub(x, add(mul(row.frequency_penalty, static_cast<float>(count)), row.presence_penalty));
}

// Steps 2-4 of an edited token. `occurred` as occurrences() tells, 0: the token is not in the history.
// `together`: the row has llama.cpp's penalties. Finite parameters make NaN only by overflow (inf - inf); it
// counts as -inf, so that a banned token stays banned.
TOKENSTEP_INLINE float apply_edits(float x, float bias, uint32_t occurred, const RowParams& row,
                                   bool together) {
  x = apply_bias(x, bias);
  if (occurred != 0) x = apply_repetition(x, row.repetition_penalty);
  if (const uint32_t count = occurred & kOutputCountMask) {
    if (together) {
      x = apply_both(x, row, count);
    } else {
      x = apply_frequency(x, row.frequency_penalty, count);
      x = apply_presence(x, row.presence_penalty);
    }
  }
  return x == x ? x : -kInfinity;
}

// Step 5: temperature. Multiplying by the rounded inverse, like dividing, keeps the order of values, and may
// make equals of neighbours.
TOKENSTEP_INLINE float inverse_temperature(float temperature) { return div(1.0f, temperature); }
TOKENSTEP_INLINE float apply_temperature(float x, float inverse) { return mul(x, inverse); }
TOKENSTEP_INLINE float divide_by_temperature(float x, float temperature) { return div(x, temperature); }
TOKENSTEP_INLINE float tempered(float x, float temperature, const Rules& rules) {
  return rules.divides ? divide_by_temperature(x, temperature)
                       : apply_temperature(x, inverse_temperature(temperature));
}

// A row is greedy if its temperature says so, or if its largest value overflowed in steps 2-5. The arg max is
// taken of the values after step 4.
TOKENSTEP_INLINE bool is_greedy(float temperature, float edited_max, const Rules& rules) {
  return temperature < rules.greedy_below || tempered(edited_max, temperature, rules) == kInfinity;
}

// Step 6: tokens below this are cut.
TOKENSTEP_INLINE float min_p_threshold(float x_max, float min_p) {
  if (!(min_p > 0.0f)) return -kInfinity;
  const float threshold = add(x_max, log_float(min_p));
  return threshold < x_max ? threshold : x_max;
}

// Step 7: how many tokens to keep; 0: all.
TOKENSTEP_INLINE int32_t effective_top_k(const RowParams& row, int32_t vocab_size) {
  return row.top_k > 0 && row.top_k < vocab_size ? row.top_k : 0;
}

// ---- the order of tokens: value descending, id ascending ------------------------------------------------
// The last token that is kept: every filter keeps a prefix of the order.
struct Cut {
  float value = -kInfinity;
  int32_t id = INT32_MAX;
};
TOKENSTEP_INLINE bool is_kept(float value, int32_t id, Cut cut) {  // without branches
  return static_cast<int>(value > cut.value) |
         (static_cast<int>(value == cut.value) & static_cast<int>(id <= cut.id));
}
// The cut that keeps less.
TOKENSTEP_INLINE Cut with_threshold(Cut cut, float threshold) {
  return threshold > cut.value ? Cut{threshold, INT32_MAX} : cut;
}
TOKENSTEP_INLINE bool comes_before(float value, int32_t id, float other_value, int32_t other_id) {
  return value != other_value ? value > other_value : id < other_id;
}

// ---- step 10 --------------------------------------------------------------------------------------------
// What a weight and a log probability are functions of. The maximum is at distance 0 even where a bias made
// it +inf.
TOKENSTEP_INLINE float distance_from_max(float x, float x_max) { return x == x_max ? 0.0f : sub(x, x_max); }

// ln of a token's share, with log_sum = log_weight_sum(sum of weights).
TOKENSTEP_INLINE float log_probability(float x, float x_max, float log_sum) {
  return sub(distance_from_max(x, x_max), log_sum);
}

}  // namespace tokenstep
