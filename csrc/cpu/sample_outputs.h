// Step 10: log probabilities, rank and top tokens of a sampled row.
#pragma once
#include "common/sample_results.h"
#include "cpu/sample_step.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

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

// The first tokens of the view in order, as many as the row wants. Of a processed row, cut tokens are at
// -inf: they follow by id.
template <class Logit, class Step>
void write_top_tokens(const SampleParams& p, Row<Logit>& row, Step& step, View view, float log_sum) {
  const int wanted = num_top_tokens(p, row.params);
  write_no_top_tokens(p, row.index, wanted);
  if (wanted == 0) return;

  Candidates& c = row.scratch.top;
  const Cut cut = view == View::kRaw ? Cut{} : step.cut();
  step.collect_top(c, wanted, cut.value, view);
  c.keep(cut);
  int count = 0;
  int32_t* order = c.order.data();
  for (int i = 0; i < c.count; ++i)
    if (c.values[i] > -kInfinity) order[count++] = i;
  std::sort(order, order + count,
            [&](int32_t a, int32_t b) { return comes_before(c.values[a], a, c.values[b], b); });
  const int64_t first = int64_t{row.index} * p.num_top_logprobs;
  for (int i = 0; i < count; ++i) {
    p.top_tokens[first + i] = c.ids[order[i]];
    p.top_logprobs[first + i] = step.log_probability_of(view, c.values[order[i]], log_sum);
  }
  write_banned_top_tokens(p, row.index, count, wanted);
}

template <class Logit, class Step>
void write_logprobs(const SampleParams& p, Row<Logit>& row, Step& step, int32_t token) {
  const View view = p.logprobs_mode == LogprobsMode::kRaw ? View::kRaw : View::kEdited;
  const float value = view == View::kRaw ? row.raw_value(token)
                                         : apply_temperature(row.edited_value(token), step.scale(view));
  const float log_sum = log_weight_sum(step.sum_of_weights(view));
  p.logprobs[row.index] = step.log_probability_of(view, value, log_sum);
  if (p.ranks) p.ranks[row.index] = rank_of(step, row.num_blocks, view, value, token);
  write_top_tokens(p, row, step, view, log_sum);
}

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
