#include "cpu/decoder_ops.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace tokenstep::cpu {
namespace {

// Rows in runs of at least `elements_per_run`: some microseconds, below which a second thread costs more to
// wake than it brings. A decode step's few rows are one run, on the calling thread.
template <class Rows>
void for_runs(int64_t num_rows, int64_t row_elements, int64_t elements_per_run, Rows&& rows) {
  const int64_t most = std::min<int64_t>(num_rows, 4 * num_threads());
  const int64_t runs =
      std::clamp<int64_t>(num_rows * row_elements / elements_per_run, 1, std::max<int64_t>(most, 1));
  parallel_for(static_cast<int>(runs),
               [&](int run) { rows(num_rows * run / runs, num_rows * (run + 1) / runs); });
}

}  // namespace

void rms_norm(const RmsNormParams& params) {
  active_isa();
  for_runs(params.num_rows, int64_t{params.num_heads} * params.size, 1 << 15,
           [&](int64_t begin, int64_t end) { TOKENSTEP_DISPATCH_ISA(rms_norm_rows, params, begin, end); });
}

void gate(const GateParams& params) {
  active_isa();
  for_runs(params.num_rows, params.size, 1 << 14,
           [&](int64_t begin, int64_t end) { TOKENSTEP_DISPATCH_ISA(gate_rows, params, begin, end); });
}

void soft_cap(const SoftCapParams& params) {
  active_isa();
  for_runs(params.num_rows, params.size, 1 << 14,
           [&](int64_t begin, int64_t end) { TOKENSTEP_DISPATCH_ISA(soft_cap_rows, params, begin, end); });
}

}  // namespace tokenstep::cpu
