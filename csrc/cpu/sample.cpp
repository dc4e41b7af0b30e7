#include "cpu/sample.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace tokenstep::cpu {
namespace {

// Waking a thread costs what it takes to read about this many logits.
constexpr int64_t kLogitsPerThread = 64 * 1024;

// How many threads are worth their start: a function of the shape alone.
int threads_for(const SampleParams& params) {
  const int64_t work = int64_t{params.num_rows} * params.vocab_size;
  return static_cast<int>(std::clamp<int64_t>(work / kLogitsPerThread, 1, num_threads()));
}

}  // namespace

void sample(const SampleParams& params) { TOKENSTEP_DISPATCH_ISA(sample_rows, params, threads_for(params)); }

void apply_logits(const ApplyLogitsParams& params) {
  TOKENSTEP_DISPATCH_ISA(apply_logits_to_rows, params, threads_for(params.sample));
}

}  // namespace tokenstep::cpu
