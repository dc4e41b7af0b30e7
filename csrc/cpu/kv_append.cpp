#include "cpu/kv_append.h"

#include <algorithm>

#include "cpu/attention.h"
#include "cpu/parallel.h"

namespace tokenstep::cpu {

void append_kv(const PagedBatch& batch, const int32_t* status) {
  active_isa();
  const auto append_sequence_rows = [&](int r, int64_t begin,
                                        int64_t end) {  // those of its rows in [begin, end)
    const int64_t length = batch.seq_lens[r];
    if (status[r] != static_cast<int32_t>(AttentionStatus::kOk) || length == 0) return;
    const int64_t first_row = batch.query_start ? batch.query_start[r] : r;
    const int64_t end_row = batch.query_start ? batch.query_start[r + 1] : r + 1;
    const int64_t first = std::max(first_row, begin), last = std::min(end_row, end);
    if (first >= last) return;
    TOKENSTEP_DISPATCH_ISA(append_rows, batch, r, length - (end_row - first), first,
                           static_cast<int>(last - first));
  };
  // Rows are cut into as many runs as there is work for; a decode step's few rows are one run, on the calling
  // thread.
  constexpr int64_t kBytesPerRun = 64 * 1024;
  const int64_t heads = 2 * batch.num_kv_heads + (batch.rope.cos ? batch.num_heads : 0);
  const int64_t bytes = batch.num_queries * heads * batch.head_dim * bytes_of(batch.dtype);
  const int runs = static_cast<int>(std::clamp<int64_t>(bytes / kBytesPerRun, 1, 4 * num_threads()));
  parallel_for(runs, [&](int run) {
    const int64_t begin = int64_t{batch.num_queries} * run / runs,
                  end = int64_t{batch.num_queries} * (run + 1) / runs;
    for (int r = 0; r < batch.num_sequences; ++r) append_sequence_rows(r, begin, end);
  });
}

}  // namespace tokenstep::cpu
