// One row of logits, read in blocks: raw, or edited by steps 1-4 (mask, bias, penalties). The scan is the
// only read of the whole row from memory. It keeps one maximum per block, raw and edited; edited values live
// in a short list by block and are never written to a copy of the row.
#pragma once
#include "common/sample_results.h"
#include "cpu/sample_candidates.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

// A token that bias or history changes.
struct Edit {
  int32_t id;
  uint32_t occurred;  // see occurrences(); 0: not in the history
  float bias;         // kNoBias: none
  float value;        // after step 4, once the scan has passed
};

// Memory of a row at work; a thread keeps two, for this row and the next.
struct RowScratch {
  Buffer<float> raw_max, edited_max;     // per block; the tail is padded with -inf to whole blocks
  Buffer<float> estimate;                // of the weights per block, in the unit exp(0)
  Buffer<uint64_t> raw_sum, sum, above;  // weights per block
  Buffer<uint64_t> most;                 // upper bounds of sums
  Buffer<Edit> edits;
  Buffer<int32_t> edits_begin, edits_end;  // range of a block's edits
  Buffer<int32_t> keys;
  Buffer<float> samples, sample_weights;
  Candidates candidates;
  Candidates top;
  Buffer<bool> slice_is_bad;
};

constexpr int kPrefetchBlocks = 8;

// Out of line, where it is one loop of whole vectors: inlined into others, compilers make less of it.
template <class Logit>
__attribute__((noinline)) void widen_block(const Logit* x, float* out) {
  for (int i = 0; i < kBlock; ++i) out[i] = to_float(x[i]);
}

template <class Logit>
class Row {
 public:
  Row(const SampleParams& p, int row_index, RowScratch& memory)
      : index(row_index),
        vocab_size(p.vocab_size),
        num_blocks((p.vocab_size + kBlock - 1) / kBlock),
        slot(p.row_slots ? p.row_slots[row_index] : row_index),
        rules(rules_of(p.semantics)),
        params(p.rows[slot]),
        scratch(memory),
        logits_(static_cast<const Logit*>(p.logits) + row_index * p.logits_stride),
        mask_(p.token_bitmask ? p.token_bitmask + row_index * p.token_bitmask_stride : nullptr) {
    const size_t padded = static_cast<size_t>((num_blocks + kBlock - 1) / kBlock * kBlock);
    pad(scratch.raw_max.reserve(padded), padded);
    const bool in_range = parameters_in_range(params);
    if (in_range) gather_edits();
    unedited_ = !mask_ && !has_edits_;
    if (in_range && wants_estimates(p)) {
      const bool cuts_untempered = rules.tempers_last && params.top_p < 1.0f;
      estimate_scale_ = cuts_untempered ? 1.0f : inverse_temperature(params.temperature);
      scratch.estimate.reserve(static_cast<size_t>(num_blocks));
    }
    if (unedited_) {
      edited_max_ = scratch.raw_max.data();
    } else {
      pad(edited_max_ = scratch.edited_max.reserve(padded), padded);
    }
  }
  Row(const Row&) = delete;
  Row& operator=(const Row&) = delete;

  const int index, vocab_size, num_blocks, slot;
  const Rules rules;
  RowParams& params;
  RowScratch& scratch;

  bool is_scanned = false;  // by the row before this one, inside its sums
  bool has_bad_logit = false;

  const char* address_of_block(int block) const {
    return reinterpret_cast<const char*>(logits_ + int64_t{block} * kBlock);
  }
  // Raw and edited values are the same.
  bool is_unedited() const { return unedited_ && temperature_ == 1.0f; }
  const float* raw_max() const { return scratch.raw_max.data(); }
  const float* edited_max() const { return edited_max_; }
  // Estimates of exp(x) after step 5 per block, if the scan made them.
  const float* estimates() const { return estimate_scale_ > 0.0f ? scratch.estimate.data() : nullptr; }
  float raw_value(int32_t id) const { return to_float(logits_[id]); }

  float edited_value(int32_t id) const {
    const Edit* edit = find_edit(id);
    const float x = edit ? edit->value : mask_ && !is_allowed(mask_, id) ? -kInfinity : raw_value(id);
    return temperature_ == 1.0f ? x : divide_by_temperature(x, temperature_);
  }

  // From now on edited values are those of step 5, divided by the temperature; only once the row is scanned.
  void divide_by(float temperature) {
    if (temperature == 1.0f) return;
    temperature_ = temperature;
    const size_t padded = static_cast<size_t>((num_blocks + kBlock - 1) / kBlock * kBlock);
    float* divided = scratch.edited_max.reserve(padded);
    for (size_t i = 0; i < padded; ++i) divided[i] = divide_by_temperature(edited_max_[i], temperature);
    edited_max_ = divided;
  }

  // The block as float32, in place where it lies so in memory, else in `buffer`; padded with -inf.
  const float* raw_block(int block, float* buffer) const {
    const Logit* x = logits_ + block * kBlock;
    const int size = block_size(block);
    if constexpr (sizeof(Logit) == sizeof(float))
      if (size == kBlock) return x;
    if (size == kBlock)
      widen_block(x, buffer);
    else
      for (int i = 0; i < kBlock; ++i) buffer[i] = i < size ? to_float(x[i]) : -kInfinity;
    return buffer;
  }

  // The block after step 4, or 5 (see divide_by); only once it is scanned.
  const float* edited_block(int block, float* buffer) const {
    if (temperature_ != 1.0f) [[unlikely]]
      return divided_block(block, buffer);
    return untempered_block(block, buffer);
  }

  // Reads blocks [begin, end) for the first time.
  bool scan(int begin, int end) {
    alignas(64) float buffer[kBlock];
    bool bad = false;
    for (int block = begin; block < end; ++block) scan_block(block, buffer, bad);
    return bad;
  }

 private:
  // Out of line: rows by our own rules never come here.
  __attribute__((noinline)) const float* divided_block(int block, float* buffer) const {
    const float* x = untempered_block(block, buffer);
    for (int i = 0; i < kBlock; ++i) buffer[i] = divide_by_temperature(x[i], temperature_);
    return buffer;
  }
  const float* untempered_block(int block, float* buffer) const {
    const float* x = raw_block(block, buffer);
    if (unedited_) return x;
    if (mask_) {
      uint32_t words[kMaskWords];
      mask_block(x, words_of_block(block, words), buffer);
      x = buffer;
    }
    if (!has_edits_ || scratch.edits_begin[block] == scratch.edits_end[block]) return x;
    if (x != buffer) memcpy(buffer, x, kBlock * sizeof(float));
    for (int i = scratch.edits_begin[block]; i < scratch.edits_end[block]; ++i)
      buffer[scratch.edits[i].id % kBlock] = scratch.edits[i].value;
    return buffer;
  }

  // Only rows that draw from all of the vocabulary profit, and only where no log probability asks for the
  // exact sum.
  bool wants_estimates(const SampleParams& p) const {
    constexpr float kLeastTemperature = 1e-5f;  // below, estimates would leave the range of floats
    if (params.temperature < kLeastTemperature || effective_top_k(params, vocab_size) || params.min_p > 0.0f)
      return false;
    if (!wants_logprobs(p, params)) return true;
    const bool raw_is_drawn = params.temperature == 1.0f && !mask_ && !has_edits_;
    return p.logprobs_mode == LogprobsMode::kRaw && !raw_is_drawn;
  }

  void scan_block(int block, float* buffer, bool& bad) {
    const bool estimates_raw = estimate_scale_ > 0.0f && unedited_;
    if constexpr (sizeof(Logit) < sizeof(float)) {
      const char* ahead = address_of_block(block + kPrefetchBlocks);
      for (size_t i = 0; i < kBlock * sizeof(Logit); i += 64) __builtin_prefetch(ahead + i, 0, 2);
      if (block_size(block) == kBlock && !estimates_raw) {
        scratch.raw_max[block] = max_of_halves(logits_ + block * kBlock, bad);
        if (!unedited_) scratch.edited_max[block] = edited_max_of_block(block, buffer);
        return;
      }
    }
    const float* x = raw_block(block, buffer);
    if (estimates_raw) {
      scratch.raw_max[block] = max_and_estimate(x, estimate_scale_, bad, scratch.estimate[block]);
      return;
    }
    scratch.raw_max[block] = max_of_block(x, bad);
    if (!unedited_) scratch.edited_max[block] = edited_max_of_block(block, buffer);
  }

  // Edits the block, given its raw maximum; returns its largest value after step 4.
  float edited_max_of_block(int block, float* buffer) {
    bool ignored = false;
    if (estimate_scale_ > 0.0f) {
      if (has_edits_) apply_edits_of_block(block);
      return max_and_estimate(edited_block(block, buffer), estimate_scale_, ignored, scratch.estimate[block]);
    }
    float largest = scratch.raw_max[block];
    if (mask_) {
      uint32_t words[kMaskWords];
      largest = max_of_allowed(raw_block(block, buffer), words_of_block(block, words));
    }
    if (!has_edits_) return largest;
    const auto [raised, lowered] = apply_edits_of_block(block, largest);
    return lowered ? max_of_block(edited_block(block, buffer), ignored) : std::max(largest, raised);
  }

  static void pad(float* maxima, size_t count) {
    for (size_t i = 0; i < count; ++i) maxima[i] = -kInfinity;
  }
  int block_size(int block) const { return std::min(kBlock, vocab_size - block * kBlock); }

  const uint32_t* words_of_block(int block, uint32_t* buffer) const {
    const uint32_t* words = mask_ + block * kMaskWords;
    const int count = (block_size(block) + 31) / 32;
    if (count == kMaskWords) return words;
    for (int i = 0; i < kMaskWords; ++i) buffer[i] = i < count ? words[i] : 0;  // the row's mask ends here
    return buffer;
  }

  const Edit* find_edit(int32_t id) const {
    if (!has_edits_) return nullptr;
    const int block = id / kBlock;
    for (int i = scratch.edits_begin[block]; i < scratch.edits_end[block]; ++i)
      if (scratch.edits[i].id == id) return &scratch.edits[i];
    return nullptr;
  }

  // Sorts the row's biases and history by block, so that a block is edited while it is in the first cache.
  // Within a block the biases come first.
  void gather_edits() {
    const int num_history = has_penalties(params) ? params.history_size : 0, num_bias = params.bias_size;
    has_edits_ = num_history > 0 || num_bias > 0;
    if (!has_edits_) return;
    const int32_t *bias_ids = params.bias_ids, *history_ids = params.history_ids;
    int32_t* begin = scratch.edits_begin.reserve(static_cast<size_t>(num_blocks) + 1);
    int32_t* end = scratch.edits_end.reserve(static_cast<size_t>(num_blocks));
    Edit* edits = scratch.edits.reserve(static_cast<size_t>(num_history) + static_cast<size_t>(num_bias));
    memset(begin, 0, sizeof(int32_t) * (static_cast<size_t>(num_blocks) + 1));
    for (int i = 0; i < num_bias; ++i) ++begin[bias_ids[i] / kBlock + 1];
    for (int i = 0; i < num_history; ++i) {
      ++begin[history_ids[i] / kBlock + 1];
      if (params.history_capacity > 0)
        __builtin_prefetch(params.history_counts + history_ids[i]);  // read soon, from all over memory
    }
    for (int block = 0; block < num_blocks; ++block) {
      begin[block + 1] += begin[block];
      end[block] = begin[block];
    }
    for (int i = 0; i < num_bias; ++i)
      edits[end[bias_ids[i] / kBlock]++] = {bias_ids[i], 0, params.bias_values[i], 0.0f};
    for (int i = 0; i < num_history; ++i) {
      const int32_t id = history_ids[i];
      edits[end[id / kBlock]++] = {id, occurrences(params, i), kNoBias, 0.0f};
    }
  }

  // A token with both a bias and a history has two entries so far: joins them.
  void join_edits_of_block(int block) {
    const int begin = scratch.edits_begin[block], end = scratch.edits_end[block];
    if (scratch.edits[begin].occurred || !scratch.edits[end - 1].occurred) return;  // of one kind only
    int16_t bias_at[kBlock];
    for (int16_t& at : bias_at) at = -1;
    int i = begin, kept = begin;
    for (; !scratch.edits[i].occurred; ++i)
      bias_at[scratch.edits[i].id % kBlock] = static_cast<int16_t>(i - begin);
    for (kept = i; i < end; ++i) {
      const Edit edit = scratch.edits[i];
      if (const int at = bias_at[edit.id % kBlock]; at >= 0)
        scratch.edits[begin + at].occurred = edit.occurred;
      else
        scratch.edits[kept++] = edit;
    }
    scratch.edits_end[block] = kept;
  }

  struct EditedMax {
    float raised = -kInfinity;  // the largest edited value
    bool lowered = false;       // an edit took the largest value down: the block's maximum may be gone
  };
  // Values of the block's edits. `largest` is the block's maximum after the mask.
  EditedMax apply_edits_of_block(int block, float largest = kInfinity) {
    EditedMax result;
    if (scratch.edits_begin[block] == scratch.edits_end[block]) return result;
    join_edits_of_block(block);
    for (int i = scratch.edits_begin[block]; i < scratch.edits_end[block]; ++i) {
      Edit& edit = scratch.edits[i];
      const float x = mask_ && !is_allowed(mask_, edit.id) ? -kInfinity : raw_value(edit.id);
      edit.value = apply_edits(x, edit.bias, edit.occurred, params, params.penalty_last_n != 0);
      result.raised = edit.value > result.raised ? edit.value : result.raised;
      result.lowered |= x == largest && edit.value < x;
    }
    return result;
  }

  const Logit* logits_;
  const uint32_t* mask_;
  float* edited_max_ = nullptr;
  bool has_edits_ = false, unedited_ = true;
  float temperature_ = 1.0f;     // by which edited values are divided
  float estimate_scale_ = 0.0f;  // 0: the scan makes no estimates
};

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
