// The memory that the sampler's kernels may use in the emulator: exactly that of their parameters.
#pragma once
#include "common/params.h"
#include "cuda/launch.cuh"

namespace tokenstep::bind {

// Confines the launches of this thread, as long as it lives, to buffers that are added.
class EmulatedBuffers {
 public:
  EmulatedBuffers() { buffers().clear(); }
  ~EmulatedBuffers() { buffers().clear(); }
  EmulatedBuffers(const EmulatedBuffers&) = delete;
  EmulatedBuffers& operator=(const EmulatedBuffers&) = delete;

  template <class T>
  void add(T* data, int64_t count) {
    constexpr bool kWritable = !std::is_const_v<T>;
    if (data && count > 0) buffers().push_back({data, static_cast<size_t>(count) * sizeof(T), kWritable});
  }
  // Rows that may be strided: what lies between them is out of bounds.
  template <class T>
  void add_rows(T* data, int64_t rows, int64_t stride, int64_t width) {
    for (int64_t row = 0; data && row < rows; ++row) add(data + row * stride, width);
  }

  void add(const SampleParams& p) {
    add(p.rows, p.num_slots);
    add(p.row_slots, p.num_rows);
    for (int slot = 0; slot < p.num_slots; ++slot) add_lists(p.rows[slot], p.vocab_size);
    add_rows(p.token_bitmask, p.num_rows, p.token_bitmask_stride, (p.vocab_size + 31) / 32);
    add(p.tokens, p.num_rows);
    add(p.status, p.num_rows);
    add(p.logprobs, p.num_rows);
    add(p.ranks, p.num_rows);
    add(p.top_tokens, int64_t{p.num_rows} * p.num_top_logprobs);
    add(p.top_logprobs, int64_t{p.num_rows} * p.num_top_logprobs);
  }
  void add_logits(const SampleParams& p) {
    const int64_t size = bytes_of(p.logits_dtype);
    add_rows(static_cast<const char*>(p.logits), p.num_rows, p.logits_stride * size, p.vocab_size * size);
  }
  void add_workspace(void* workspace, size_t bytes) {
    add(static_cast<char*>(workspace), static_cast<int64_t>(bytes));
  }

 private:
  static std::vector<simt::Buffer>& buffers() { return cuda::emulation.buffers; }
  void add_lists(const RowParams& row, int vocab_size) {
    const bool dense = row.history_capacity > 0;
    add(row.history_ids, dense ? row.history_capacity : row.history_size);
    add(row.history_counts, dense ? vocab_size : row.history_size);
    add(row.bias_ids, row.bias_size);
    add(row.bias_values, row.bias_size);
  }
};

}  // namespace tokenstep::bind
