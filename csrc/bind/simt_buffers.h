// The memory that kernels may use in the emulator: exactly that of their parameters.
#pragma once
#include "bind/tensor.h"
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

  void add(const AttentionParams& p) {
    const PagedBatch& batch = p.batch;
    add(batch, false);
    add_heads<Access::kWrite>(p.out, batch.num_queries, batch.num_heads, batch);
    add(p.lse, p.lse ? int64_t{batch.num_queries} * batch.num_heads : 0);
    add(p.alibi_slopes, batch.num_heads);
    add(p.sinks, batch.num_heads);
    add_workspace(p.workspace, static_cast<size_t>(p.workspace_bytes));
  }
  // A batch whose new rows, if there are any, go into the caches.
  void add(const PagedBatch& batch, bool rotates_q) {
    rotates_q ? add_heads<Access::kWrite>(batch.q, batch.num_queries, batch.num_heads, batch)
              : add_heads<Access::kRead>(batch.q, batch.num_queries, batch.num_heads, batch);
    add_heads<Access::kRead>(batch.new_k, batch.num_queries, batch.num_kv_heads, batch);
    add_heads<Access::kRead>(batch.new_v, batch.num_queries, batch.num_kv_heads, batch);
    for (const CacheView& cache : {batch.k_cache, batch.v_cache})
      for (int block = 0; block < batch.num_blocks; ++block)
        for (int slot = 0; slot < batch.block_size; ++slot)
          for (int head = 0; head < batch.num_kv_heads; ++head) {
            const int64_t size = bytes_of(batch.cache_dtype);
            char* const row =
                static_cast<char*>(cache.data) +
                (block * cache.block_stride + slot * cache.token_stride + head * cache.head_stride) * size;
            batch.new_k.data ? add(row, batch.head_dim * size) : add<const char>(row, batch.head_dim * size);
          }
    add_rows(batch.block_table, batch.num_sequences, batch.block_table_stride, batch.max_blocks);
    add(batch.seq_lens, batch.num_sequences);
    add(batch.query_start, batch.num_sequences + 1);
    add(batch.status, batch.num_sequences);
    const int64_t angles = int64_t{batch.rope.max_position} * batch.rope.rotary_dim / 2;
    add(batch.rope.cos, angles);
    add(batch.rope.sin, angles);
    add(batch.k_scale, batch.num_kv_heads);
    add(batch.v_scale, batch.num_kv_heads);
  }
  void add(const MergeParams& p) {
    const int64_t size = bytes_of(p.dtype), heads = int64_t{p.num_queries} * p.num_heads;
    for (int64_t part = 0; part < p.num_parts; ++part)
      for (int64_t row = 0; row < p.num_queries; ++row) {
        add_rows(static_cast<const char*>(p.outs) + (part * p.part_stride + row * p.row_stride) * size,
                 p.num_heads, p.head_stride * size, p.head_dim * size);
        add_rows(p.lses + part * p.lse_part_stride + row * p.lse_row_stride, p.num_heads, p.lse_head_stride,
                 1);
      }
    add(static_cast<char*>(p.out), heads * p.head_dim * size);
    add(p.lse, heads);
  }

 private:
  static std::vector<simt::Buffer>& buffers() { return cuda::emulation.buffers; }
  template <Access kAccess>
  void add_heads(const RowsView& view, int64_t rows, int64_t heads, const PagedBatch& batch) {
    using Byte = std::conditional_t<kAccess == Access::kWrite, char, const char>;
    const int64_t size = bytes_of(batch.dtype);
    for (int64_t row = 0; view.data && row < rows; ++row)
      add_rows(static_cast<Byte*>(view.data) + row * view.row_stride * size, heads, view.head_stride * size,
               batch.head_dim * size);
  }
  void add_lists(const RowParams& row, int vocab_size) {
    const bool dense = row.history_capacity > 0;
    add(row.history_ids, dense ? row.history_capacity : row.history_size);
    add(row.history_counts, dense ? vocab_size : row.history_size);
    add(row.window, row.window ? int64_t{row.penalty_last_n} + vocab_size : 0);
    add(row.bias_ids, row.bias_size);
    add(row.bias_values, row.bias_size);
  }
};

}  // namespace tokenstep::bind
