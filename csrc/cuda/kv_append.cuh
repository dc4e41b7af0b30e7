// Rotation and append of one head, as append_kv and paged_attention share them (RoFormer, Su et al., arXiv
// 2104.09864): products and sums in float32, each rounded, then rounded once to the type of the cache. The
// bits are those of the CPU (csrc/cpu/attention_rope.h).
#pragma once
#include "common/params.h"
#include "cuda/element.cuh"

namespace tokenstep::cuda {

// Element i of a head after its rotation, not yet rounded. A rotation of no dimensions (rotary_dim 0) is
// none.
template <class T>
__device__ __forceinline__ float rotated(const RopeParams& rope, int64_t position, const T* head, int i) {
  const float x = widen(head[i]);
  if (i >= rope.rotary_dim) return x;
  const int half = rope.rotary_dim / 2;
  const bool is_first = rope.interleaved ? i % 2 == 0 : i < half;
  const int pair = rope.interleaved ? i / 2 : is_first ? i : i - half;
  const int distance = rope.interleaved ? 1 : half;
  const float other = widen(head[is_first ? i + distance : i - distance]);
  const float cos = rope.cos[position * half + pair], sin = rope.sin[position * half + pair];
  const float turned = __fmul_rn(other, sin);
  return is_first ? __fsub_rn(__fmul_rn(x, cos), turned) : __fadd_rn(__fmul_rn(x, cos), turned);
}

// The row of a page, or of q, k, v, that holds a head.
template <class T>
__device__ __forceinline__ T* head_of(const RowsView& view, int64_t row, int head) {
  return static_cast<T*>(view.data) + row * view.row_stride + head * view.head_stride;
}
template <class T>
__device__ __forceinline__ T* head_of(const CacheView& cache, int64_t block, int slot, int head) {
  return static_cast<T*>(cache.data) + block * cache.block_stride + slot * cache.token_stride +
         head * cache.head_stride;
}

// Elements of the cache from those of new rows: rounded, or divided by the head's scale and quantised.
template <class C>
__device__ __forceinline__ C stored(float x, [[maybe_unused]] float scale) {
  if constexpr (sizeof(C) == 1)
    return narrow<C>(div(x, scale));
  else
    return narrow<C>(x);
}
// The scale of a head, 1 if its cache has none.
__device__ __forceinline__ float scale_of(const float* scales, int kv_head) {
  return scales ? scales[kv_head] : 1.0f;
}

// Element i of a new row's key, and of its value, as the cache holds them.
template <class T, class C>
__device__ __forceinline__ C stored_key(const RopeParams& rope, int64_t position, const T* key, int i,
                                        float scale) {
  return stored<C>(rotated(rope, position, key, i), scale);
}
template <class T, class C>
__device__ __forceinline__ C stored_value(const T* value, int i, float scale) {
  if constexpr (std::is_same_v<T, C>)
    return value[i];
  else
    return stored<C>(widen(value[i]), scale);
}

// Writes one KV head of row `row` of new_k and new_v, the token at `position`, to its page. `block` is a
// valid id. So many threads share the work, this one is number `thread`.
template <class T, class C>
__device__ __forceinline__ void append_head(const PagedBatch& batch, int64_t row, int64_t position,
                                            int64_t block, int kv_head, int thread, int num_threads) {
  const int slot = static_cast<int>(position % batch.block_size);
  const T* const key = head_of<T>(batch.new_k, row, kv_head);
  const T* const value = head_of<T>(batch.new_v, row, kv_head);
  C* const key_out = head_of<C>(batch.k_cache, block, slot, kv_head);
  C* const value_out = head_of<C>(batch.v_cache, block, slot, kv_head);
  const float key_scale = scale_of(batch.k_scale, kv_head), value_scale = scale_of(batch.v_scale, kv_head);
  for (int i = thread; i < batch.head_dim; i += num_threads) {
    key_out[i] = stored_key<T, C>(batch.rope, position, key, i, key_scale);
    value_out[i] = stored_value<T, C>(value, i, value_scale);
  }
}

}  // namespace tokenstep::cuda
