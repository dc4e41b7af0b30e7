// Step 10: log probabilities, rank and top tokens of a sampled row, its history, and what a row without a
// token gets.
#pragma once
#include "cpu/sample_step.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

inline void write_no_logprobs(const SampleParams& p, int index, int first) {
  const int width = p.num_top_logprobs;
  for (int i = first; i < width; ++i) {
    if (p.top_tokens) p.top_tokens[int64_t{index} * width + i] = -1;
    if (p.top_logprobs) p.top_logprobs[int64_t{index} * width + i] = __builtin_nanf("");
  }
}

inline void write_failure(const SampleParams& p, int index, SampleStatus status) {
  p.tokens[index] = -1;
  p.status[index] = static_cast<int32_t>(status);
  if (p.logprobs) p.logprobs[index] = __builtin_nanf("");
  if (p.ranks) p.ranks[index] = 0;
  write_no_logprobs(p, index, 0);
}

// 1 + the number of tokens before this one in (value descending, id ascending).
template <class Step>
int32_t rank_of(const Step& step, int num_blocks, View view, float value, int32_t token) {
  alignas(64) float buffer[kBlock];
  const float scale = step.scale(view);
  const float* maxima = step.block_max(view);
  const float just_below = next_below(value);
  int32_t rank = 1;
  for (int b = 0; b < num_blocks; ++b) {
    if (!(mul(maxima[b], scale) >= value)) continue;
    const float* x = step.block(b, view, buffer);
    rank += count_above(x, scale, (b + 1) * kBlock <= token ? just_below : value);
    for (int32_t id = b * kBlock; id < token && id < (b + 1) * kBlock && b == token / kBlock; ++id)
      rank += mul(x[id % kBlock], scale) == value;
  }
  return rank;
}

// The first `wanted` tokens of the view in order. Of a processed row, cut tokens are at -inf: they follow by
// id.
template <class Logit, class Step>
void write_top_tokens(const SampleParams& p, Row<Logit>& row, Step& step, View view, float log_sum,
                      int wanted) {
  const int first_unused = std::min(wanted, row.vocab_size);
  int64_t* tokens = p.top_tokens + int64_t{row.index} * p.num_top_logprobs;
  float* logprobs = p.top_logprobs + int64_t{row.index} * p.num_top_logprobs;
  write_no_logprobs(p, row.index, first_unused);
  if (first_unused == 0) return;

  Candidates& c = row.scratch.top;
  const Cut cut = view == View::kRaw ? Cut{} : step.cut();
  step.collect_top(c, first_unused, cut.value, view);
  c.keep(cut);
  int count = 0;
  int32_t* order = c.order.data();
  for (int i = 0; i < c.count; ++i)
    if (c.values[i] > -kInfinity) order[count++] = i;
  std::sort(order, order + count,
            [&](int32_t a, int32_t b) { return comes_before(c.values[a], a, c.values[b], b); });
  for (int i = 0; i < count; ++i) {
    tokens[i] = c.ids[order[i]];
    logprobs[i] = log_probability(c.values[order[i]], step.x_max(view), log_sum);
  }
  // Fewer finite tokens than wanted: all of them are listed, so any other id is at -inf.
  const int finite = count;
  for (int32_t id = 0; count < first_unused; ++id) {
    bool listed = false;
    for (int i = 0; i < finite; ++i) listed |= tokens[i] == id;
    if (listed) continue;
    tokens[count] = id;
    logprobs[count++] = -kInfinity;
  }
}

template <class Logit, class Step>
void write_logprobs(const SampleParams& p, Row<Logit>& row, Step& step, int32_t token) {
  const View view = p.logprobs_mode == LogprobsMode::kRaw ? View::kRaw : View::kEdited;
  const float value = view == View::kRaw ? row.raw_value(token)
                                         : apply_temperature(row.edited_value(token), step.scale(view));
  const float log_sum = log_weight_sum(step.sum_of_weights(view));
  if (p.logprobs) p.logprobs[row.index] = log_probability(value, step.x_max(view), log_sum);
  if (p.ranks) p.ranks[row.index] = rank_of(step, row.num_blocks, view, value, token);
  if (p.top_tokens && p.top_logprobs && p.num_top_logprobs > 0)
    write_top_tokens(p, row, step, view, log_sum, std::min(row.params.num_logprobs, p.num_top_logprobs));
}

// The token joins the row's history, and the row moves on by one position.
template <class Logit>
void record_token(const SampleParams& p, Row<Logit>& row, int32_t token) {
  RowParams& params = row.params;
  ++params.position;
  if (params.history_capacity <= 0 || p.history_counts_stride == 0) return;
  uint32_t& count = p.history_counts[row.slot * p.history_counts_stride + token];
  if (count == 0 && params.history_size < params.history_capacity)
    p.history_ids[params.history_begin + params.history_size++] = token;
  ++count;
}

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
