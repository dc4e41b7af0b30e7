// Append: rotate the new keys (and queries, in place), round to the cache's type or quantise, write the page.
// Nothing is materialised: a head goes from its row through one register-sized buffer into its page. Each new
// row is read once and written once. The work is cut by rows; a row's position and page come from its
// sequence's length.
#include <type_traits>

#include "cpu/attention_rope.h"
#include "cpu/fp_environment.h"
#include "cpu/kv_append.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

template <class T>
T* head_of(const RowsView& view, int64_t row, int64_t head) {
  return static_cast<T*>(view.data) + row * view.row_stride + head * view.head_stride;
}

// One head into its page, rotated if `rope` is given. A cache of another type is quantised: x / scale,
// rounded once.
template <class T, class C>
void write_head(const T* in, int head_dim, const RopeParams* rope, int64_t position,
                [[maybe_unused]] float scale, C* page) {
  float head[kMaxHeadDim];
  if constexpr (std::is_same_v<T, C>) {
    const int rotated = rope ? rope->rotary_dim : 0;
    if (rope) {
      load_head(in, rotated, head);
      rotate_head(*rope, position, head);
      store_head(head, rotated, page);
    }
    memcpy(page + rotated, in + rotated, sizeof(T) * (head_dim - rotated));
  } else {
    load_head(in, head_dim, head);
    if (rope) rotate_head(*rope, position, head);
    for (int d = 0; d < head_dim; ++d) head[d] = div(head[d], scale);
    store_head(head, head_dim, page);
  }
}

template <class T, class C>
void append_heads(const PagedBatch& batch, int sequence, int64_t position, int64_t row) {
  const int64_t block = batch.block_table[sequence * batch.block_table_stride + position / batch.block_size];
  const int64_t slot = position % batch.block_size;
  for (int head = 0; head < batch.num_kv_heads; ++head) {
    const auto page = [&](const CacheView& cache) {
      return static_cast<C*>(cache.data) + block * cache.block_stride + slot * cache.token_stride +
             head * cache.head_stride;
    };
    const auto scale = [&](const float* scales) { return scales ? scales[head] : 1.0f; };
    write_head(head_of<T>(batch.new_k, row, head), batch.head_dim, batch.rope.cos ? &batch.rope : nullptr,
               position, scale(batch.k_scale), page(batch.k_cache));
    write_head(head_of<T>(batch.new_v, row, head), batch.head_dim, nullptr, position, scale(batch.v_scale),
               page(batch.v_cache));
  }
}

template <class T>
void append_row(const PagedBatch& batch, int sequence, int64_t position, int64_t row) {
  if (batch.new_k.data) {
    if (batch.cache_dtype == DType::kFloat8E4M3)
      append_heads<T, Float8>(batch, sequence, position, row);
    else if (batch.cache_dtype == DType::kInt8)
      append_heads<T, Int8>(batch, sequence, position, row);
    else
      append_heads<T, T>(batch, sequence, position, row);
  }
  if (!batch.q.data || !batch.rope.cos) return;
  float rotated[kMaxHeadDim];
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
  with_element_of(batch.dtype, [&](auto element) {
    for (int i = 0; i < count; ++i)
      append_row<decltype(element)>(batch, sequence, first_position + i, first_row + i);
  });
}

}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
