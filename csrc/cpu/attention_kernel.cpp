// Paged attention, one work item: some query rows of one sequence and one KV head, over some chunks of its
// keys.
//
// Fused: rotation of q, gather of pages, scores, scale, softcap, ALiBi, mask, online softmax, weighted
// values, merge of chunks, sink and log-sum-exp. Never materialised: a contiguous copy of the cache, scores
// beyond one tile, the mask. Of a quantised cache, codes are multiplied as they are, exact in float32; a
// head's scales join the factor of its scores and the division of its outputs. Mapping: an item is a work
// unit of a thread (attention.cpp). All q heads of a KV head and all positions of a query tile share one pass
// over K and V, which reads 2 * D * keys elements once, where they lie. An item's KV heads take turns tile by
// tile, so that memory is read in long pieces, and while one tile is computed, the next one's lines are
// fetched, across items too. Order: chunks at fixed absolute positions (attention_plan.h), in them tiles of
// kTileTokens at fixed absolute positions, in them fixed chains (attention_tile.h). A row skips the tiles
// that it sees nothing of. Hence its bits depend on nothing else. Source: FlashAttention-2 (Dao, arXiv
// 2307.08691), PagedAttention (Kwon et al., arXiv 2309.06180), sinks (Xiao et al., arXiv 2309.17453; one
// learned score per head as in gpt-oss).
#include <utility>

#include "common/attention_plan.h"
#include "cpu/attention_item.h"
#include "cpu/attention_pages.h"
#include "cpu/attention_rope.h"
#include "cpu/attention_softmax.h"
#include "cpu/attention_tile.h"
#include "cpu/attention_tile_bf16.h"
#include "cpu/fp_environment.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

struct alignas(64) Scratch {
  float queries[kMaxItemRows * kMaxHeadDim];
  float keys[kTileTokens * kMaxHeadDim];  // of a tile that many rows share, as float32
  float values[kTileTokens * kMaxHeadDim];
  float scores[kRowBlock * kTileTokens];
  float weights[kRowBlock * kTileTokens];
  float outputs[kMaxItemRows * kMaxHeadDim];        // of the current chunk
  float total_outputs[kMaxItemRows * kMaxHeadDim];  // of the chunks before
  AttentionItem::Row places[kMaxItemRows];
  RowState states[kMaxItemRows];
  RowPart totals[kMaxItemRows];
};

alignas(64) constexpr float kZeroRow[kMaxHeadDim] = {};

// Keys and values are of Tile::Element, queries and results of the batch's dtype.
template <class Tile>
class ItemAttention {
  using T = typename Tile::Element;

 public:
  ItemAttention(const AttentionParams& params, const AttentionItem& item, const AttentionItem* next,
                Scratch& scratch)
      : params_(params),
        batch_(params.batch),
        item_(item),
        next_(next),
        scratch_(scratch),
        pages_(params, item),
        head_dim_(batch_.head_dim),
        width_(Tile::output_length(head_dim_)),
        last_position_(item.first_position + item.num_positions - 1) {}

  void run() {
    load_queries();
    for (int row = 0; row < item_.num_rows(); ++row)
      scratch_.totals[row] = {kMinusInfinity, 0.0f, scratch_.total_outputs + row * width_};
    TilePages<T> tiles[2];
    current_ = &tiles[0];
    later_ = &tiles[1];
    pages_.find(item_.chunk_begin, pages_.first_tile(item_.chunk_begin), *current_);
    for (int64_t chunk = item_.chunk_begin; chunk < item_.chunk_end; ++chunk) {
      attend_chunk(chunk);
      for (int row = 0; row < item_.num_rows(); ++row) {
        float* outputs = scratch_.outputs + row * width_;
        Tile::restore_order(outputs, head_dim_);
        merge_part(scratch_.totals[row], {scratch_.states[row].max, scratch_.states[row].sum(), outputs},
                   head_dim_);
      }
    }
    if (!item_.parts) return finish_rows();
    leave_part();
    if (__atomic_add_fetch(item_.arrivals, 1, __ATOMIC_ACQ_REL) != item_.num_parts) return;
    merge_all_parts();
    finish_rows();
  }

 private:
  // ---- queries --------------------------------------------------------------------------------------------
  void load_queries() {
    float head[kMaxHeadDim];
    auto* out = reinterpret_cast<typename Tile::Query*>(scratch_.queries);
    for (int i = 0; i < item_.num_rows(); ++i, out += Tile::query_length(head_dim_)) {
      const AttentionItem::Row row = scratch_.places[i] = item_.row(i);
      with_element_of(batch_.dtype, [&](auto element) {
        load_rotated_head(row_of<decltype(element)>(batch_.q, row), head_dim_, batch_.rope,
                          item_.first_position + row.position, head);
      });
      Tile::pack_query(head, head_dim_, out);
    }
  }

  // ---- one chunk ------------------------------------------------------------------------------------------
  void attend_chunk(int64_t chunk) {
    const int rows = item_.num_rows();
    memset(scratch_.outputs, 0, sizeof(float) * rows * width_);
    for (int row = 0; row < rows; ++row) scratch_.states[row].clear();
    const int64_t end = pages_.chunk_end(chunk);
    for (int64_t tile = pages_.first_tile(chunk); tile < end; tile += kTileTokens) {
      find_later(chunk, tile + kTileTokens, end);
      for (int head = 0; head < item_.num_kv_heads; ++head) attend_tile(tile, head);
      std::swap(current_, later_);
    }
  }

  // The tile after this one: of the next chunk, or of the thread's next item, if need be.
  void find_later(int64_t chunk, int64_t tile, int64_t end) {
    later_kv_head_ = item_.kv_head;
    if (tile < end) return pages_.find(chunk, tile, *later_);
    if (++chunk < item_.chunk_end) return pages_.find(chunk, pages_.first_tile(chunk), *later_);
    later_kv_head_ = -1;
    if (!next_) return;
    const Pages<T> pages(params_, *next_);
    pages.find(next_->chunk_begin, pages.first_tile(next_->chunk_begin), *later_);
    later_kv_head_ = next_->kv_head;
  }

  // ---- one tile of one KV head ----------------------------------------------------------------------------
  RowWindow window_of(int64_t position, int64_t tile) const {
    const int64_t begin = first_key(position, params_.window) - tile, end = position + 1 - tile;
    return {static_cast<int>(begin > 0 ? begin : 0), static_cast<int>(end < kTileTokens ? end : kTileTokens),
            static_cast<float>(tile - position)};
  }

  // Zeros stand for tokens outside [first, last).
  void select_rows(int kv_head, int first, int last, TileRows<T>& rows) const {
    const int64_t key_offset = kv_head * batch_.k_cache.head_stride;
    const int64_t value_offset = kv_head * batch_.v_cache.head_stride;
    const T* zeros = reinterpret_cast<const T*>(kZeroRow);
    for (int i = 0; i < kTileTokens; ++i) {
      rows.keys[i] = current_->keys[i] + key_offset;
      rows.values[i] = current_->values[i] + value_offset;
    }
    for (int i = 0; i < first; ++i) rows.keys[i] = rows.values[i] = zeros;
    for (int i = last; i < kTileTokens; ++i) rows.keys[i] = rows.values[i] = zeros;
  }

  // `head` counts from the item's first KV head.
  void attend_tile(int64_t tile, int head) {
    // Positions that see some of the tile: from its first token on, until the window has left its last.
    const int64_t first = tile > item_.first_position ? tile : item_.first_position;
    int64_t last = last_position_;
    if (params_.window > 0 && last > tile + kTileTokens - 2 + params_.window)
      last = tile + kTileTokens - 2 + params_.window;
    if (first > last) return;
    TileRows<T> rows;
    select_rows(item_.kv_head + head, current_->first, current_->last, rows);
    Later<T> later_keys{}, later_values{};
    if (later_kv_head_ >= 0) {
      later_keys = {later_->keys, (later_kv_head_ + head) * batch_.k_cache.head_stride};
      later_values = {later_->values, (later_kv_head_ + head) * batch_.v_cache.head_stride};
    }
    const bool uniform = !window_of(first, tile).partial() && !window_of(last, tile).partial();
    if (first == last || uniform || Tile::all_finite(rows.values, head_dim_)) {
      if constexpr (Tile::kWidens) {
        if ((last + 1 - first) * item_.heads_per_kv_head > kRowBlock) {
          TileRows<float> wide;
          widen_rows(rows.keys, later_keys, scratch_.keys, wide.keys);
          widen_rows(rows.values, later_values, scratch_.values, wide.values);
          return attend_positions<FloatTile<float>>(tile, head, wide, {}, {}, first, last);
        }
      }
      return attend_positions<Tile>(tile, head, rows, later_keys, later_values, first, last);
    }

    // A weight of 0 does not silence an infinity or NaN: each position gets values without those that it must
    // not see.
    for (int64_t position = first; position <= last; ++position) {
      const RowWindow window = window_of(position, tile);
      select_rows(item_.kv_head + head, window.begin, window.end, rows);
      attend_positions<Tile>(tile, head, rows, later_keys, later_values, position, position);
    }
  }

  // Many rows share a conversion to float32.
  void widen_rows(const T* const* tokens, Later<T> later, float* out, const float** rows) const {
    for (int token = 0; token < kTileTokens; ++token, out += width_) {
      rows[token] = out;
      for (int d = 0; d < head_dim_; d += kLanes) {
        later.template fetch_share<1, kLanes>(token, d);
        store(out + d, load_first(tokens[token] + d, head_dim_ - d));
      }
    }
  }

  // RowTile is Tile, or FloatTile<float> for widened rows: queries and weights are the same for both.
  template <class RowTile, class E = typename RowTile::Element>
  void attend_positions(int64_t tile, int head, const TileRows<E>& rows, Later<E> later_keys,
                        Later<E> later_values, int64_t first, int64_t last) {
    const int heads = item_.heads_per_kv_head, first_row = head * item_.rows_per_kv_head();
    const int begin = first_row + static_cast<int>(first - item_.first_position) * heads;
    const int end = first_row + static_cast<int>(last + 1 - item_.first_position) * heads;
    const auto* queries = reinterpret_cast<const typename Tile::Query*>(scratch_.queries);
    auto* weights = reinterpret_cast<typename Tile::Weight*>(scratch_.weights);
    const ScoreRules rules(params_, item_.kv_head + head);
    for_row_blocks(begin, end, [&](int row, auto count) {
      constexpr int kRows = decltype(count)::value;
      RowTile::template score<kRows>(queries + row * Tile::query_length(head_dim_), rows.keys, later_keys,
                                     head_dim_, scratch_.scores);
      float alpha[kRows];
      for (int r = 0; r < kRows; ++r) {
        const AttentionItem::Row place = scratch_.places[row + r];
        const float slope = params_.alibi_slopes ? params_.alibi_slopes[place.head] * kLog2E : 0.0f;
        alpha[r] = update_row<Tile>(rules, scratch_.scores + r * kTileTokens,
                                    window_of(item_.first_position + place.position, tile), slope,
                                    scratch_.states[row + r], weights + r * kTileTokens);
      }
      RowTile::template accumulate<kRows>(weights, rows.values, later_values, alpha, head_dim_,
                                          scratch_.outputs + row * width_);
      later_keys = later_values = {};  // once is enough
    });
  }

  // ---- results --------------------------------------------------------------------------------------------
  // A part: outputs [rows][head_dim], then max and sum of each row.
  void leave_part() const {
    const int rows = item_.num_rows();
    float* part = item_.parts + item_.part * part_floats(rows, head_dim_);
    for (int row = 0; row < rows; ++row) {
      memcpy(part + row * head_dim_, scratch_.totals[row].outputs, sizeof(float) * head_dim_);
      part[rows * head_dim_ + 2 * row] = scratch_.totals[row].max;
      part[rows * head_dim_ + 2 * row + 1] = scratch_.totals[row].sum;
    }
  }

  void merge_all_parts() {
    const int rows = item_.num_rows();
    for (int row = 0; row < rows; ++row) {
      RowPart& total = scratch_.totals[row];
      total.sum = 0.0f;
      for (int i = 0; i < item_.num_parts; ++i) {
        float* part = item_.parts + i * part_floats(rows, head_dim_);
        const float* numbers = part + rows * head_dim_ + 2 * row;
        merge_part(total, {numbers[0], numbers[1], part + row * head_dim_}, head_dim_);
      }
    }
  }

  void finish_rows() {
    for (int row = 0; row < item_.num_rows(); ++row) {
      RowPart& total = scratch_.totals[row];
      if (total.sum == 0.0f) memset(total.outputs, 0, sizeof(float) * head_dim_);
      const AttentionItem::Row place = scratch_.places[row];
      if (params_.sinks) add_sink(total, params_.sinks[place.head], head_dim_);
      const float scale = batch_.v_scale ? batch_.v_scale[kv_head_of(row)] : 1.0f;
      with_element_of(batch_.dtype, [&](auto element) {
        write_output(total, head_dim_, scale, row_of<decltype(element)>(params_.out, place));
      });
      if (params_.lse)
        params_.lse[(item_.first_row + place.position) * batch_.num_heads + place.head] = log_sum_exp(total);
    }
  }

  template <class E>
  E* row_of(const RowsView& rows, AttentionItem::Row row) const {
    return static_cast<E*>(rows.data) + (item_.first_row + row.position) * rows.row_stride +
           row.head * rows.head_stride;
  }

  int kv_head_of(int row) const { return item_.kv_head + row / item_.rows_per_kv_head(); }

  const AttentionParams& params_;
  const PagedBatch& batch_;
  const AttentionItem& item_;
  const AttentionItem* next_;
  Scratch& scratch_;
  const Pages<T> pages_;
  const int head_dim_, width_;
  const int64_t last_position_;
  TilePages<T>* current_ = nullptr;
  TilePages<T>* later_ = nullptr;  // being fetched, from this KV head on; -1: nothing
  int later_kv_head_ = -1;
};

}  // namespace

size_t attention_scratch_bytes() { return sizeof(Scratch); }

void attend(const AttentionParams& params, const AttentionItem& item, const AttentionItem* next,
            void* scratch) {
  const FpEnvironment environment;
  Scratch& memory = *static_cast<Scratch*>(scratch);
  const auto run = [&]<class Tile>(Tile) { ItemAttention<Tile>(params, item, next, memory).run(); };
  switch (params.batch.cache_dtype) {
    case DType::kFloat32:
      return run(FloatTile<float>{});
    case DType::kFloat16:
      return run(FloatTile<Half>{});
    case DType::kFloat8E4M3:
      return run(FloatTile<Float8>{});
    case DType::kInt8:
      return run(FloatTile<Int8>{});
    default:
#if defined(__AVX512BF16__)
      return run(BFloatTile{});
#else
      return run(FloatTile<BFloat>{});
#endif
  }
}

}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
