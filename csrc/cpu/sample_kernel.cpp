// Fused sampler: raw logits to token, log probabilities and history, in one call. Never materialised: edited
// logits, probabilities, masks or counts over the vocabulary, sorted tokens.
//
// A row is read once from memory (sample_row.h) and weighed at most once more from the cache (sample_step.h).
// Threads take rows one by one, and scan their next row inside the sums of this one; where rows are fewer
// than threads, each pass over a row is split among them. Either way every result is the same: sums are
// integers, maxima have no order. Work: B * V * bytes of a logit from memory, about 30 instructions per 16
// logits to weigh them.
#include <atomic>
#include <memory>
#include <optional>

#include "cpu/fp_environment.h"
#include "cpu/parallel.h"
#include "cpu/sample.h"
#include "cpu/sample_outputs.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

struct WholeRow {
  static constexpr int count = 1;
  template <class F>
  void run(int num_blocks, F f) const {
    f(0, num_blocks, 0);
  }
};

struct Slices {
  const int count;
  template <class F>
  void run(int num_blocks, F f) const {
    parallel_for(count, [&](int slice) {
      const FpEnvironment environment;
      const auto edge = [&](int i) { return static_cast<int>(int64_t{num_blocks} * i / count); };
      f(edge(slice), edge(slice + 1), slice);
    });
  }
};

template <class Step, class Logit>
void sample_row(const SampleParams& p, Row<Logit>& row, Step& step) {
  const bool logprobs = wants_logprobs(p, row.params), raw = p.logprobs_mode == LogprobsMode::kRaw;
  if (const SampleStatus status = step.prepare(/*ranks_edited=*/logprobs && !raw);
      status != SampleStatus::kSampled)
    return write_failure(p, row.index, status);
  step.cut_tokens(/*draws=*/true, logprobs && raw, logprobs && !raw);
  const int32_t token = step.is_greedy_row() ? step.arg_max() : step.draw();
  p.tokens[row.index] = token;
  p.status[row.index] = static_cast<int32_t>(SampleStatus::kSampled);
  if (logprobs)
    write_logprobs(p, row, step, token);
  else
    write_no_logprobs(p, row.index);
  if (has_window(row.params))
    record_token_in_window(row.params, token);
  else
    record_token(row.params, token);
}

// Writes the row after step 8. `out` may be the row itself: a block is written after it was read.
template <class Step, class Logit>
void apply_logits_to_row(const ApplyLogitsParams& p, Row<Logit>& row, Step& step) {
  float* out = p.out + row.index * p.out_stride;
  const SampleStatus status = step.prepare(/*ranks_edited=*/false);
  p.sample.status[row.index] = static_cast<int32_t>(status);
  int32_t only = -1;
  if (status == SampleStatus::kSampled) {
    step.cut_tokens(/*draws=*/false, false, false);
    if (!step.is_greedy_row()) {
      alignas(64) float buffer[kBlock];
      const float scale = step.scale(View::kEdited);
      const Cut cut = step.cut();
      for (int block = 0; block < row.num_blocks; ++block) {
        const float* x = row.edited_block(block, buffer);
        const int begin = block * kBlock, size = std::min(kBlock, row.vocab_size - begin);
        for (int i = 0; i < size; ++i) {
          const float value = apply_temperature(x[i], scale);
          out[begin + i] = is_kept(value, begin + i, cut) ? step.tempered_late(value) : -kInfinity;
        }
      }
      return;
    }
    only = step.arg_max();
  }
  const float value = only < 0 ? 0.0f : row.edited_value(only);
  std::fill(out, out + row.vocab_size, -kInfinity);
  if (only >= 0) out[only] = value;
}

// Runs work(row, step) for every row.
template <class Logit, class Work>
void for_each_row(const SampleParams& p, int num_threads, Work work) {
  struct Memory {
    RowScratch rows[2];
    std::unique_ptr<Candidates[]> slices;
    int num_slices = 0;
  };
  static thread_local Memory memory;
  if (p.num_rows < num_threads) {
    if (memory.num_slices < num_threads) {
      memory.slices = std::make_unique<Candidates[]>(static_cast<size_t>(num_threads));
      memory.num_slices = num_threads;
    }
    const FpEnvironment environment;
    const Slices slices{num_threads};
    for (int index = 0; index < p.num_rows; ++index) {
      Row<Logit> row(p, index, memory.rows[0]);
      RowStep<Logit, Slices> step(row, slices, memory.slices.get(), nullptr);
      work(row, step);
    }
    return;
  }
  std::atomic<int> claimed{0};  // rows are claimed one ahead, so that a thread knows its next
  parallel_for(num_threads, [&](int) {
    const FpEnvironment environment;
    RowScratch* scratch = memory.rows;
    std::optional<Row<Logit>> rows[2];
    int index = claimed.fetch_add(1, std::memory_order_relaxed);
    if (index < p.num_rows) rows[0].emplace(p, index, scratch[0]);
    for (int current = 0; index < p.num_rows; current ^= 1) {
      Row<Logit>* next = nullptr;
      index = claimed.fetch_add(1, std::memory_order_relaxed);
      if (index < p.num_rows) next = &rows[current ^ 1].emplace(p, index, scratch[current ^ 1]);
      const WholeRow whole;
      RowStep<Logit, WholeRow> step(*rows[current], whole, nullptr, next);
      work(*rows[current], step);
    }
  });
}

template <class Work>
void for_each_row_of_dtype(const SampleParams& p, int num_threads, Work work) {
  switch (p.logits_dtype) {
    case DType::kFloat32:
      return for_each_row<float>(p, num_threads, work);
    case DType::kFloat16:
      return for_each_row<_Float16>(p, num_threads, work);
    default:
      return for_each_row<BFloat16>(p, num_threads, work);
  }
}

}  // namespace

void sample_rows(const SampleParams& params, int num_threads) {
  for_each_row_of_dtype(params, num_threads, [&](auto& row, auto& step) { sample_row(params, row, step); });
}

void apply_logits_to_rows(const ApplyLogitsParams& params, int num_threads) {
  for_each_row_of_dtype(params.sample, num_threads,
                        [&](auto& row, auto& step) { apply_logits_to_row(params, row, step); });
}

}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
