#include "cpu/linear.h"

#include <algorithm>
#include <memory>

#include "cpu/parallel.h"

namespace tokenstep::cpu {

void linear(const LinearParams& params) {
  const PackedMatrix& weights = *params.weights;
  if (params.num_rows == 0 || weights.rows() == 0) return;
  const LinearScratch size = TOKENSTEP_DISPATCH_ISA(linear_scratch, params);
  const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(size.widened + size.sums)]);
  const LinearInputs inputs =
      TOKENSTEP_DISPATCH_ISA(prepare_inputs, params, scratch.get(), scratch.get() + size.widened);

  // As many tasks as there is work for, a few a thread, so that one which loses its core holds up little.
  constexpr int64_t kWorkPerTask = 1 << 16;  // weights times rows: some microseconds
  const int64_t tiles = weights.tiles();
  const int64_t work = tiles * kTileRows * weights.columns() * params.num_rows / kWorkPerTask;
  const int64_t most = std::min<int64_t>(tiles, 4 * num_threads());
  const int tasks = static_cast<int>(std::clamp<int64_t>(work, 1, most));
  parallel_for(tasks, [&](int task) {
    TOKENSTEP_DISPATCH_ISA(linear_tiles, params, inputs, tiles * task / tasks, tiles * (task + 1) / tasks);
  });
}

void gather_rows(const PackedMatrix& weights, const int64_t* rows, int64_t count, DType dtype, void* out) {
  active_isa();
  const int64_t columns = weights.columns(), bytes = columns * bytes_of(dtype);
  const int64_t tasks = std::clamp<int64_t>(count * columns >> 16, 1, 4 * num_threads());
  parallel_for(static_cast<int>(tasks), [&](int task) {
    const std::unique_ptr<float[]> row(new float[static_cast<size_t>(columns)]);
    for (int64_t i = count * task / tasks; i < count * (task + 1) / tasks; ++i) {
      weights.unpack(rows[i], row.get());
      TOKENSTEP_DISPATCH_ISA(store_floats, row.get(), columns, dtype, static_cast<uint8_t*>(out) + i * bytes);
    }
  });
}

}  // namespace tokenstep::cpu
