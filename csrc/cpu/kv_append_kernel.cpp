// Append: rotate the new keys (and queries, in place), round to the cache's type, write the page.
// Nothing is materialised: a head goes from its row through one register-sized buffer into its page. Each new
// row is read once and written once. The work is cut by rows; a row's position and page come from its
// sequence's length.
#include "cpu/attention_rope.h"
#include "cpu/fp_environment.h"
#include "cpu/kv_append.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

template <class T>
T* head_of(const RowsView& view, int64_t row, int64_t head) {
  return static_cast<T*>(view.data) + row * view.row_stride + head * view.head_stride;
}

template <class T>
void append_row(const PagedBatch& batch, int sequence, int64_t position, int64_t row) {
  float rotated[kMaxHeadDim];
  const int head_dim = batch.head_dim;
  if (batch.new_k.data) {
    const int64_t block =
        batch.block_table[sequence * batch.block_table_stride + position / batch.block_size];
    const int64_t slot = position % batch.block_size;
    for (int head = 0; head < batch.num_kv_heads; ++head) {
      const auto page = [&](const CacheView& cache) {
        return static_cast<T*>(cache.data) + block * cache.block_stride + slot * cache.token_stride +
               head * cache.head_stride;
      };
      const T* key = head_of<T>(batch.new_k, row, head);
      if (batch.rope.cos) {
        load_head(key, head_dim, rotated);
        rotate_head(batch.rope, position, rotated);
        store_head(rotated, batch.rope.rotary_dim, page(batch.k_cache));
        memcpy(page(batch.k_cache) + batch.rope.rotary_dim, key + batch.rope.rotary_dim,
               sizeof(T) * (head_dim - batch.rope.rotary_dim));
      } else {
        memcpy(page(batch.k_cache), key, sizeof(T) * head_dim);
      }
      memcpy(page(batch.v_cache), head_of<T>(batch.new_v, row, head), sizeof(T) * head_dim);
    }
  }
  if (!batch.q.data || !batch.rope.cos) return;
  for (int head = 0; head < batch.num_heads; ++head) {
    T* query = head_of<T>(batch.q, row, head);
    load_head(query, batch.rope.rotary_dim, rotated);
    rotate_head(batch.rope, position, rotated);
    store_head(rotated, batch.rope.rotary_dim, query);
  }
}

}  // namespace

void append_rows(const PagedBatch& batch, int sequence, int64_t first_position, int64_t first_row,
                 int count) {
  const FpEnvironment environment;
  for (int i = 0; i < count; ++i) {
    switch (batch.dtype) {
      case DType::kFloat32:
        append_row<float>(batch, sequence, first_position + i, first_row + i);
        break;
      case DType::kFloat16:
        append_row<Half>(batch, sequence, first_position + i, first_row + i);
        break;
      default:
        append_row<BFloat>(batch, sequence, first_position + i, first_row + i);
    }
  }
}

}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
