// From tokens to addresses: which tiles the chunks of an item have, and where in the pages the tokens of a
// tile lie. For attention_kernel.cpp alone.
#pragma once
#include "common/attention_plan.h"
#include "common/params.h"
#include "cpu/attention_item.h"
#include "cpu/attention_tile.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

// The tokens of a tile, one address each.
template <class T>
struct TileRows {
  const T* keys[kTileTokens];
  const T* values[kTileTokens];
};

// A tile's rows of KV head 0. Tokens outside [first, last) are seen by no row of the item and may have no
// page at all: theirs is the address of the first that has.
template <class T>
struct TilePages : TileRows<T> {
  int first, last;
};

// Where an item's tokens lie, and which tiles its chunks have.
template <class T>
class Pages {
 public:
  Pages(const AttentionParams& params, const AttentionItem& item)
      : batch_(params.batch),
        table_(batch_.block_table + item.sequence * batch_.block_table_stride),
        chunk_tokens_(chunk_tokens(batch_.head_dim, batch_.cache_dtype)),
        seen_begin_(first_key(item.first_position, params.window)),
        seen_end_(item.first_position + item.num_positions) {}

  // Keys of a chunk that some row of the item sees.
  int64_t chunk_begin(int64_t chunk) const {
    const int64_t begin = chunk * chunk_tokens_;
    return begin > seen_begin_ ? begin : seen_begin_;
  }
  int64_t chunk_end(int64_t chunk) const {
    const int64_t end = (chunk + 1) * chunk_tokens_;
    return end < seen_end_ ? end : seen_end_;
  }
  int64_t first_tile(int64_t chunk) const { return chunk_begin(chunk) / kTileTokens * kTileTokens; }

  void find(int64_t chunk, int64_t tile, TilePages<T>& rows) const {
    const int64_t begin = chunk_begin(chunk) - tile, end = chunk_end(chunk) - tile;
    rows.first = static_cast<int>(begin > 0 ? begin : 0);
    rows.last = static_cast<int>(end < kTileTokens ? end : kTileTokens);
    int64_t column = (tile + rows.first) / batch_.block_size;
    int slot = static_cast<int>((tile + rows.first) % batch_.block_size);
    const CacheView &k = batch_.k_cache, &v = batch_.v_cache;
    for (int i = rows.first; i < rows.last; ++column, slot = 0) {
      const int64_t block = table_[column];
      const T* key = static_cast<const T*>(k.data) + block * k.block_stride;
      const T* value = static_cast<const T*>(v.data) + block * v.block_stride;
      for (; slot < batch_.block_size && i < rows.last; ++slot, ++i) {
        rows.keys[i] = key + slot * k.token_stride;
        rows.values[i] = value + slot * v.token_stride;
      }
    }
    const auto repeat_first = [&](int from, int to) {
      for (int i = from; i < to; ++i) {
        rows.keys[i] = rows.keys[rows.first];
        rows.values[i] = rows.values[rows.first];
      }
    };
    repeat_first(0, rows.first);
    repeat_first(rows.last, kTileTokens);
  }

 private:
  const PagedBatch& batch_;
  const int32_t* table_;
  const int chunk_tokens_;
  const int64_t seen_begin_, seen_end_;
};

}  // namespace
}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
