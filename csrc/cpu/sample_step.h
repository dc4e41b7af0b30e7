// From one scanned row to one token: which tokens are kept (steps 6-8), and the draw among them (step 9).
//
// Thresholds come from block maxima: the k-th largest maximum bounds the k-th largest token from below, so
// that top-k, min-p and most nuclei visit few blocks. Only where a sum over the vocabulary is needed
// (temperature alone, top-p, log probabilities) does a second pass weigh every token, from the second cache,
// while it scans the thread's next row.
#pragma once
#include "cpu/sample_bounds.h"
#include "cpu/sample_nucleus.h"
#include "cpu/sample_row.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

// Values of step 0, or of step 5 (of step 4 in a greedy row, and where the temperature comes last).
enum class View { kRaw, kEdited };

// Split says how a row's blocks are divided among threads: split.run(num_blocks, f) calls f(begin, end,
// slice) for split.count ranges. Results never depend on it: weights are integers.
template <class Logit, class Split>
class RowStep {
 public:
  RowStep(Row<Logit>& row, const Split& split, Candidates* slices, Row<Logit>* next)
      : row_(row), split_(split), slices_(slices), next_(next), candidates_(row.scratch.candidates) {}

  // Reads the row and applies steps 1-5. `ranks_edited`: log probabilities of the edited view will follow.
  SampleStatus prepare(bool ranks_edited) {
    if (!parameters_in_range(row_.params)) return SampleStatus::kBadParameter;
    if (!row_.is_scanned) {
      bool* bad = row_.scratch.slice_is_bad.reserve(static_cast<size_t>(split_.count));
      split_.run(row_.num_blocks, [&](int begin, int end, int slice) { bad[slice] = row_.scan(begin, end); });
      for (int slice = 0; slice < split_.count; ++slice) row_.has_bad_logit |= bad[slice];
    }
    raw_max_ = largest_of(row_.raw_max());
    if (row_.has_bad_logit || raw_max_ == kInfinity) return SampleStatus::kBadLogit;
    const float edited_max = row_.is_unedited() ? raw_max_ : largest_of(row_.edited_max());
    if (edited_max == -kInfinity) return SampleStatus::kNoToken;
    x_max_ = edited_max;
    greedy_ = is_greedy(row_.params.temperature, edited_max, row_.rules);
    if (greedy_) return SampleStatus::kSampled;
    temper(ranks_edited);
    if (x_max_ == -kInfinity || late_x_max_ == -kInfinity) return SampleStatus::kNoToken;
    const bool waits = row_.rules.min_p_last && row_.params.top_p < 1.0f;
    (waits ? last_threshold_ : threshold_) = min_p_threshold(x_max_, row_.params.min_p);
    cut_.value = threshold_;
    return SampleStatus::kSampled;
  }

  // Steps 6-8: finds the cut and, for the draw, the weights of what is kept. `wants_raw_sum` and
  // `wants_edited_sum` ask for the sums that log probabilities need.
  void cut_tokens(bool draws, bool wants_raw_sum, bool wants_edited_sum) {
    const int32_t top_k = effective_top_k(row_.params, row_.vocab_size);
    const bool has_top_k = top_k > 0, has_top_p = row_.params.top_p < 1.0f;
    if (greedy_) {
      if (wants_raw_sum || wants_edited_sum) sweep(wants_edited_sum, wants_raw_sum);
      if (wants_edited_sum) total_ = sum_of(row_.scratch.sum.data());
      return;
    }
    const bool weighs = draws || wants_edited_sum;
    if (has_top_k || few_blocks_reach(threshold_)) {  // what is left fits a small buffer: no sum over V
      if (wants_raw_sum) sweep(false, true);
      if (has_top_k)
        cut_ = collect_top(candidates_, top_k, threshold_, View::kEdited, row_.rules.keeps_ties);
      else
        collect(candidates_, threshold_, View::kEdited);
      candidates_.weigh(x_max_);
      if (has_top_p) cut_ = select_weight(candidates_, top_p_target(row_.params.top_p, candidates_.total()));
      keep_candidates(cut_);
      return finish(weighs);
    }
    const bool is_weighed_late = tempers_late() && !has_top_p;
    if (!wants_edited_sum && !is_weighed_late && settle_within_bounds(draws, has_top_p)) {
      if (wants_raw_sum) sweep(false, true);
      return finish(weighs);
    }
    const bool needs_sums = (weighs && !is_weighed_late) || has_top_p;
    if (needs_sums || wants_raw_sum) sweep(needs_sums, wants_raw_sum);
    if (needs_sums) {
      block_sums_ = row_.scratch.sum.data();
      total_ = sum_of(block_sums_);
    }
    if (has_top_p) cut_top_p();
    finish(weighs);
  }

  // Step 5's arg max: the lowest id of the largest value after step 4.
  int32_t arg_max() const {
    alignas(64) float buffer[kBlock];
    for (int block = 0;; ++block) {
      if (row_.edited_max()[block] != x_max_) continue;
      const float* x = row_.edited_block(block, buffer);
      for (int i = 0; i < kBlock; ++i)
        if (x[i] == x_max_) return block * kBlock + i;
    }
  }

  // Step 9.
  int32_t draw() const {
    if (settled_token_ >= 0) return settled_token_;
    const uint64_t target = draw_target(draw_bits(), total_);
    return candidates_hold_all_ ? walk_candidates(target) : walk_blocks(target);
  }

  bool is_greedy_row() const { return greedy_; }
  Cut cut() const { return cut_; }
  float scale(View view) const { return view == View::kRaw ? 1.0f : scale_; }
  // A value of the edited view in the distribution that is drawn from.
  float tempered_late(float value) const {
    return tempers_late() ? divide_by_temperature(value, late_temperature_) : value;
  }
  float log_probability_of(View view, float value, float log_sum) const {
    if (view == View::kRaw) return log_probability(value, raw_max_, log_sum);
    return log_probability(tempered_late(value), tempers_late() ? late_x_max_ : x_max_, log_sum);
  }
  // Sum of the weights: of the raw row, or of what is kept of the edited one.
  uint64_t sum_of_weights(View view) const {
    return view == View::kEdited
               ? total_
               : sum_of(raw_sums_are_shared_ ? row_.scratch.sum.data() : row_.scratch.raw_sum.data());
  }
  const float* block(int index, View view, float* buffer) const {
    return view == View::kRaw ? row_.raw_block(index, buffer) : row_.edited_block(index, buffer);
  }
  const float* block_max(View view) const { return view == View::kRaw ? row_.raw_max() : row_.edited_max(); }

  // The k first tokens in order that are at least `least`, ids ascending; fewer if there are not so many,
  // more if those that equal the k-th count too. Returns the cut behind them.
  Cut collect_top(Candidates& c, int k, float least, View view, bool keeps_ties = false) {
    float bound = -kInfinity;
    if (k <= row_.num_blocks) {
      int32_t* keys = row_.scratch.keys.reserve(static_cast<size_t>(row_.num_blocks));
      bound = mul(bound_of_kth_largest(block_max(view), row_.num_blocks, k, keys), scale(view));
    }
    collect(c, std::max(bound, least), view, k, keeps_ties);
    if (c.count < k) return {least, INT32_MAX};
    const Cut cut = keep_count(c, k, keeps_ties);
    return cut;
  }

 private:
  float largest_of(const float* maxima) const {  // padded with -inf to whole blocks
    bool ignored = false;
    float largest = -kInfinity;
    for (int i = 0; i < row_.num_blocks; i += kBlock)
      largest = std::max(largest, max_of_block(maxima + i, ignored));
    return largest;
  }
  uint64_t sum_of(const uint64_t* sums) const {
    uint64_t total = 0;
    for (int block = 0; block < row_.num_blocks; ++block) total += sums[block];
    return total;
  }
  uint64_t draw_bits() const {
    return random_bits(row_.params.seed, row_.params.position, row_.params.substream);
  }
  // Step 5. Where it comes last, cuts and ranks go by untempered values.
  void temper(bool ranks_edited) {
    const RowParams& p = row_.params;
    if (!row_.rules.divides) {
      scale_ = inverse_temperature(p.temperature);
      x_max_ = apply_temperature(x_max_, scale_);
      return;
    }
    const bool cuts = effective_top_k(p, row_.vocab_size) || p.top_p < 1.0f || p.min_p > 0.0f;
    if (row_.rules.tempers_last && (cuts || ranks_edited)) {
      late_temperature_ = p.temperature;
      late_x_max_ = divide_by_temperature(x_max_, p.temperature);
    } else {
      row_.divide_by(p.temperature);
      x_max_ = divide_by_temperature(x_max_, p.temperature);
    }
  }
  bool tempers_late() const { return late_temperature_ != 1.0f; }

  float scaled_max(int block) const { return apply_temperature(row_.edited_max()[block], scale_); }

  bool few_blocks_reach(float threshold) const {
    if (threshold == -kInfinity) return false;
    int count = 0;
    for (int block = 0; block < row_.num_blocks; ++block) count += scaled_max(block) >= threshold;
    return count <= row_.num_blocks / 4;
  }

  // Tries to cut or draw without weighing all tokens.
  bool settle_within_bounds(bool draws, bool has_top_p) {
    constexpr double kLightShareOfDraw = 0.01, kLightShareOfCut = 0.002;
    if (!draws && !has_top_p) return true;
    BlockBounds bounds;
    if (!bound_blocks(row_, scale_, x_max_, has_top_p ? kLightShareOfCut : kLightShareOfDraw, bounds))
      return false;
    if (!has_top_p) {
      settled_token_ = draw_within(bounds, row_, scale_, x_max_, draw_bits());
      return settled_token_ >= 0;
    }
    const uint64_t least = top_p_target(row_.params.top_p, bounds.total_least);
    const uint64_t most = top_p_target(row_.params.top_p, bounds.total_most);
    if (!collect_nucleus(most)) return false;
    const Cut cut = select_weight(candidates_, most), first = select_weight(candidates_, least);
    if (cut.value != first.value || cut.id != first.id) return false;
    keep_candidates(cut);
    return true;
  }

  // Weighs all tokens, block by block, and scans the next row meanwhile: its reads from memory overlap this
  // arithmetic.
  void sweep(bool edited, bool raw) {
    RowScratch& s = row_.scratch;
    const size_t num_blocks = static_cast<size_t>(row_.num_blocks);
    raw_sums_are_shared_ =
        edited && raw && row_.is_unedited() && scale_ == 1.0f && !tempers_late() && threshold_ == -kInfinity;
    if (edited) s.sum.reserve(num_blocks);
    if (raw && !raw_sums_are_shared_) s.raw_sum.reserve(num_blocks);
    split_.run(row_.num_blocks, [&](int begin, int end, int) {
      for (int ahead = begin; ahead < end; ++ahead) {
        const int b = end - 1 - (ahead - begin);  // last scanned, first weighed: what the cache still holds
        const char* prefetch =
            next_ ? next_->address_of_block(ahead + kPrefetchBlocks) : row_.address_of_block(b);
        if (next_) next_->has_bad_logit |= next_->scan(ahead, ahead + 1);
        alignas(64) float buffer[kBlock];
        if (raw && !raw_sums_are_shared_) {
          const float log2_top = mul(sub(row_.raw_max()[b], raw_max_), kLog2E);
          s.raw_sum[b] = TOKENSTEP_ISA_NAMESPACE::sum_of_weights(row_.raw_block(b, buffer), 1.0f, raw_max_,
                                                                 log2_top, prefetch);
        }
        if (edited) s.sum[b] = edited_sum_of_block(b, prefetch);
      }
    });
    if (next_) next_->is_scanned = true;
    next_ = nullptr;
  }

  uint64_t edited_sum_of_block(int block, const char* prefetch) const {
    alignas(64) float buffer[kBlock];
    const float top = scaled_max(block);
    if (top < threshold_) return 0;
    const float* x = row_.edited_block(block, buffer);
    if (x_max_ == kInfinity) {  // a bias overflowed: the tokens at +inf share the mass
      uint64_t sum = 0;
      for (int i = 0; i < kBlock; ++i) sum += x[i] == kInfinity ? weight(0.0f) : 0;
      return sum;
    }
    if (threshold_ != -kInfinity) return sum_of_weights_from(x, scale_, x_max_, threshold_);
    const float log2_top = mul(sub(top, x_max_), kLog2E);
    return TOKENSTEP_ISA_NAMESPACE::sum_of_weights(x, scale_, x_max_, log2_top, prefetch);
  }

  // Drops what comes behind the k first candidates, or behind those that equal the k-th.
  static Cut keep_count(Candidates& c, int k, bool keeps_ties) {
    Cut cut = select_count(c, k);
    if (keeps_ties) cut.id = INT32_MAX;
    c.keep(cut);
    return cut;
  }

  // All tokens >= least, visiting only blocks that can have one. With k, only the k first need to be among
  // them: they are thinned out now and then, so that rows full of ties stay cheap.
  void collect(Candidates& c, float least, View view, int k = 0, bool keeps_ties = false) {
    alignas(64) float buffer[kBlock];
    int most = 2 * k + 2048;
    const float factor = scale(view);
    const float* maxima = block_max(view);
    c.clear(row_.vocab_size);
    for (int b = 0; b < row_.num_blocks; ++b) {
      if (!(mul(maxima[b], factor) >= least)) continue;
      c.count = collect_tokens(block(b, view, buffer), factor, least, kInfinity, b * kBlock, c.values.data(),
                               c.ids.data(), c.count);
      if (k == 0 || c.count <= most) continue;
      const Cut cut = keep_count(c, k, keeps_ties);
      most = 2 * c.count + 2048;
      least = keeps_ties ? cut.value : next_above(cut.value);  // ids ascend: a later equal cannot enter
    }
    drop_padding(c);
  }
  void drop_padding(Candidates& c) const {  // of the last block, if the least value was -inf
    while (c.count > 0 && c.ids[c.count - 1] >= row_.vocab_size) --c.count;
  }

  // Collects tokens that surely weigh `target` together, largest first; false if they may be many.
  bool collect_nucleus(uint64_t target) {
    float least = -kInfinity;
    if (!bound_of_nucleus(row_.edited_max(), row_.num_blocks, scale_, x_max_, target, row_.scratch, least))
      return false;
    collect(candidates_, std::max(least, threshold_), View::kEdited);
    candidates_.weigh(x_max_);
    return true;
  }
  void keep_candidates(Cut cut) {  // what is kept is all among the candidates
    cut_ = cut;
    total_ = candidates_.drop(cut);
    candidates_hold_all_ = true;
  }

  // What comes behind top-p: min-p, and the weights that are drawn from, where these come last.
  void finish(bool weighs) {
    if (last_threshold_ > cut_.value) {
      cut_ = with_threshold(cut_, last_threshold_);
      if (!candidates_hold_all_) {
        collect(candidates_, last_threshold_, View::kEdited);
        candidates_.weigh(x_max_);
      }
      keep_candidates(cut_);
    }
    if (!tempers_late() || !weighs) return;
    if (candidates_hold_all_) {
      total_ = candidates_.weigh_tempered(cut_, late_temperature_, late_x_max_);
      return;
    }
    uint64_t* sums = row_.scratch.sum.reserve(static_cast<size_t>(row_.num_blocks));
    split_.run(row_.num_blocks, [&](int begin, int end, int) {
      for (int b = begin; b < end; ++b) sums[b] = tempered_sum_of_block(b);
    });
    block_sums_ = sums;
    total_ = sum_of(sums);
    bracket_holds_cut_ = false;
  }

  // What is kept of a block, tempered; -inf elsewhere.
  const float* tempered_block(int block, float* buffer) const {
    const float* x = row_.edited_block(block, buffer);
    for (int i = 0; i < kBlock; ++i)
      buffer[i] = is_kept(x[i], block * kBlock + i, cut_) ? divide_by_temperature(x[i], late_temperature_)
                                                          : -kInfinity;
    return buffer;
  }
  uint64_t tempered_sum_of_block(int block) const {
    alignas(64) float buffer[kBlock];
    const float top = row_.edited_max()[block];
    if (top < cut_.value) return 0;
    const float log2_top = mul(sub(divide_by_temperature(top, late_temperature_), late_x_max_), kLog2E);
    return TOKENSTEP_ISA_NAMESPACE::sum_of_weights(tempered_block(block, buffer), 1.0f, late_x_max_, log2_top,
                                                   row_.address_of_block(block));
  }

  // Step 8 where the kept tokens are not in a small buffer yet. The total is known exactly.
  void cut_top_p() {
    const uint64_t target = top_p_target(row_.params.top_p, total_);
    if (collect_nucleus(target)) return keep_candidates(select_weight(candidates_, target));
    // A wide nucleus: tokens above a bracket of values are summed by block, those inside are candidates. A
    // wrong guess costs another pass, never a wrong token.
    Bracket bracket = guess_bracket(row_, scale_, x_max_, threshold_, row_.params.top_p, total_);
    for (;;) {
      const uint64_t above = sum_above_and_collect(bracket);
      candidates_.weigh(x_max_);
      const uint64_t inside = candidates_.total();
      if (above < target && above + inside >= target) {
        cut_ = select_weight(candidates_, target - above);
        total_ = above + candidates_.drop(cut_);
        block_sums_ = row_.scratch.above.data();
        bracket_holds_cut_ = true;
        return;
      }
      bracket = {threshold_, kInfinity};
    }
  }

  uint64_t sum_above_and_collect(Bracket bracket) {
    uint64_t* above = row_.scratch.above.reserve(static_cast<size_t>(row_.num_blocks));
    const float first_above = bracket.most < kInfinity ? next_above(bracket.most) : kInfinity;
    for (int slice = 1; slice < split_.count; ++slice) slices_[slice].clear(row_.vocab_size);
    candidates_.clear(row_.vocab_size);
    split_.run(row_.num_blocks, [&](int begin, int end, int slice) {
      alignas(64) float buffer[kBlock];
      Candidates& c = slice == 0 ? candidates_ : slices_[slice];
      for (int b = begin; b < end; ++b) {
        const float top = scaled_max(b);
        above[b] = 0;
        if (!(top >= bracket.least)) continue;
        const float* x = row_.edited_block(b, buffer);
        if (top > bracket.most) above[b] = sum_of_weights_from(x, scale_, x_max_, first_above);
        c.count = collect_tokens(x, scale_, bracket.least, bracket.most, b * kBlock, c.values.data(),
                                 c.ids.data(), c.count);
      }
    });
    for (int slice = 1; slice < split_.count; ++slice) candidates_.append(slices_[slice]);
    drop_padding(candidates_);
    return sum_of(above);
  }

  int32_t walk_candidates(uint64_t target) const {
    uint64_t sum = 0;
    for (int i = 0; i < candidates_.count; ++i)
      if ((sum += candidates_.weights[i]) > target) return candidates_.ids[i];
    return -1;
  }

  // Block sums first, then one block in detail.
  int32_t walk_blocks(uint64_t target) const {
    uint64_t sum = 0;
    for (int b = 0, i = 0; b < row_.num_blocks; ++b) {
      uint64_t here = block_sums_[b];
      if (bracket_holds_cut_)
        for (; i < candidates_.count && candidates_.ids[i] < (b + 1) * kBlock; ++i)
          here += candidates_.weights[i];
      if (sum + here <= target) {
        sum += here;
        continue;
      }
      alignas(64) float buffer[kBlock];
      alignas(64) uint64_t weights[kBlock];
      if (tempers_late()) {  // what is cut weighs nothing
        weights_of_block(tempered_block(b, buffer), 1.0f, late_x_max_, weights);
        for (int j = 0; j < kBlock; ++j)
          if ((sum += weights[j]) > target) return b * kBlock + j;
        return -1;
      }
      const float* x = row_.edited_block(b, buffer);
      weights_of_block(x, scale_, x_max_, weights);
      for (int j = 0; j < kBlock; ++j)
        if (is_kept(apply_temperature(x[j], scale_), b * kBlock + j, cut_) && (sum += weights[j]) > target)
          return b * kBlock + j;
    }
    return -1;
  }

  Row<Logit>& row_;
  const Split& split_;
  Candidates* slices_;
  Row<Logit>* next_;
  Candidates& candidates_;

  bool greedy_ = false;
  float raw_max_ = 0, scale_ = 1, x_max_ = 0, threshold_ = -kInfinity;
  float last_threshold_ = -kInfinity;               // min-p's, where it comes last
  float late_temperature_ = 1, late_x_max_ = 0.0f;  // where the temperature does
  Cut cut_;
  int32_t settled_token_ = -1;        // the draw, where bounds sufficed
  uint64_t total_ = 0;                // weight of what is kept
  bool candidates_hold_all_ = false;  // everything kept is among the candidates
  bool bracket_holds_cut_ = false;    // block_sums_ counts what lies above the candidates
  const uint64_t* block_sums_ = nullptr;
  bool raw_sums_are_shared_ = false;
};

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
