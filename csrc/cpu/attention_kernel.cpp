// Paged attention, one work item: some query rows of one sequence and one KV head, over some chunks of its
// keys.
//
// Fused: rotation of q, gather of pages, scores, scale, softcap, ALiBi, mask, online softmax, weighted
// values, merge of chunks, sink and log-sum-exp. Never materialised: a contiguous copy of the cache, scores
// beyond one tile, the mask. Mapping: an item is a work unit of a thread (attention.cpp); all q heads of a KV
// head and all positions of a query tile share one pass over K and V, which read (2 * D * keys) elements
// once; each tile is packed into L1 and used by every row. Order: chunks at fixed absolute positions
// (attention_plan.h), in them tiles of kTileTokens at fixed absolute positions, in them fixed chains
// (attention_tile.h). A row skips the tiles that it sees nothing of. Hence its bits depend on nothing else.
// Source: FlashAttention-2 (Dao, arXiv 2307.08691), PagedAttention (Kwon et al., arXiv 2309.06180), sinks
// (Xiao et al., arXiv 2309.17453; one learned score per head as in gpt-oss).
#include "common/attention_plan.h"
#include "cpu/attention_item.h"
#include "cpu/attention_rope.h"
#include "cpu/attention_softmax.h"
#include "cpu/attention_tile.h"
#include "cpu/attention_tile_bf16.h"
#include "cpu/fp_environment.h"

namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE {
namespace {

constexpr int kTilesAhead = 2;  // whose page addresses are known and whose lines are being fetched

struct alignas(64) Scratch {
  float queries[kMaxItemRows * kMaxHeadDim];
  float keys[kTileTokens * kMaxHeadDim];
  float values[kTileTokens * kMaxHeadDim];
  float scores[kRowBlock * kTileTokens];
  float weights[kRowBlock * kTileTokens];
  float outputs[kMaxItemRows * kMaxHeadDim];        // of the current chunk
  float total_outputs[kMaxItemRows * kMaxHeadDim];  // of the chunks before
  RowState states[kMaxItemRows];
  RowPart totals[kMaxItemRows];
};

alignas(64) constexpr float kZeroRow[kMaxHeadDim] = {};

template <class Tile, class T>
class ItemAttention {
 public:
  ItemAttention(const AttentionParams& params, const AttentionItem& item, Scratch& scratch)
      : params_(params),
        batch_(params.batch),
        item_(item),
        scratch_(scratch),
        rules_(params),
        head_dim_(batch_.head_dim),
        width_(Tile::packed_dims(head_dim_)),
        chunk_tokens_(chunk_tokens(head_dim_, batch_.cache_dtype)),
        last_position_(item.first_position + item.num_positions - 1) {}

  void run() {
    load_queries();
    for (int row = 0; row < item_.num_rows(); ++row)
      scratch_.totals[row] = {kMinusInfinity, 0.0f, scratch_.total_outputs + row * width_};
    for (int64_t chunk = item_.chunk_begin; chunk < item_.chunk_end; ++chunk) {
      attend_chunk(chunk);
      for (int row = 0; row < item_.num_rows(); ++row) {
        const RowPart part{scratch_.states[row].max, sum_lanes(load(scratch_.states[row].lane_sums)),
                           scratch_.outputs + row * width_};
        merge_part(scratch_.totals[row], part, head_dim_);
      }
    }
    if (!item_.parts) return finish_rows();
    leave_part();
    if (__atomic_add_fetch(item_.arrivals, 1, __ATOMIC_ACQ_REL) != item_.num_parts) return;
    merge_all_parts();
    finish_rows();
  }

 private:
  // ---- queries
  // ------------------------------------------------------------------------------------------------------
  void load_queries() {
    float head[kMaxHeadDim];
    auto* out = reinterpret_cast<typename Tile::Query*>(scratch_.queries);
    for (int i = 0; i < item_.num_positions; ++i)
      for (int h = 0; h < item_.num_heads; ++h, out += Tile::query_length(head_dim_)) {
        const T* query = static_cast<const T*>(batch_.q.data) + (item_.first_row + i) * batch_.q.row_stride +
                         (item_.first_head + h) * batch_.q.head_stride;
        load_rotated_head(query, head_dim_, batch_.rope, item_.first_position + i, head);
        Tile::pack_query(head, head_dim_, out);
      }
  }

  // ---- pages
  // --------------------------------------------------------------------------------------------------------
  struct TileRows {
    const T* keys[kTileTokens];
    const T* values[kTileTokens];
  };

  // Addresses of the tile's tokens in [begin, end); a row of zeros for the others, which may have no page at
  // all.
  void find_rows(int64_t tile, int64_t begin, int64_t end, TileRows& rows) const {
    const T* zeros = reinterpret_cast<const T*>(kZeroRow);
    const int first = static_cast<int>(begin > tile ? begin - tile : 0);
    const int last = static_cast<int>(end < tile + kTileTokens ? end - tile : kTileTokens);
    for (int i = 0; i < first; ++i) rows.keys[i] = rows.values[i] = zeros;
    for (int i = last < 0 ? 0 : last; i < kTileTokens; ++i) rows.keys[i] = rows.values[i] = zeros;
    if (first >= last) return;
    const int32_t* table = batch_.block_table + item_.sequence * batch_.block_table_stride;
    int64_t column = (tile + first) / batch_.block_size;
    int slot = static_cast<int>((tile + first) % batch_.block_size);
    const CacheView &k = batch_.k_cache, &v = batch_.v_cache;
    for (int i = first; i < last; ++column, slot = 0) {
      const int64_t block = table[column];
      const T* key = static_cast<const T*>(k.data) + block * k.block_stride + item_.kv_head * k.head_stride;
      const T* value = static_cast<const T*>(v.data) + block * v.block_stride + item_.kv_head * v.head_stride;
      for (; slot < batch_.block_size && i < last; ++slot, ++i) {
        rows.keys[i] = key + slot * k.token_stride;
        rows.values[i] = value + slot * v.token_stride;
      }
    }
  }

  void prefetch(const TileRows& rows) const {
    const int bytes = head_dim_ * static_cast<int>(sizeof(T));
    for (int i = 0; i < kTileTokens; ++i)
      for (int b = 0; b < bytes; b += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(rows.keys[i]) + b, 0, 2);
        __builtin_prefetch(reinterpret_cast<const char*>(rows.values[i]) + b, 0, 2);
      }
  }

  // ---- one chunk
  // ----------------------------------------------------------------------------------------------------
  void attend_chunk(int64_t chunk) {
    const int rows = item_.num_rows();
    memset(scratch_.outputs, 0, sizeof(float) * rows * width_);
    for (int row = 0; row < rows; ++row) {
      scratch_.states[row].max = kMinusInfinity;
      store(scratch_.states[row].lane_sums, Floats{});
    }
    const int64_t chunk_first = chunk * chunk_tokens_, chunk_last = chunk_first + chunk_tokens_;
    const int64_t seen_first = first_key(item_.first_position, params_.window);
    const int64_t begin = seen_first > chunk_first ? seen_first : chunk_first;
    const int64_t end = last_position_ + 1 < chunk_last ? last_position_ + 1 : chunk_last;

    TileRows ahead[kTilesAhead + 1];
    int64_t next = begin / kTileTokens * kTileTokens;  // the next tile whose addresses are to be found
    int next_place = 0;
    const auto fetch_next = [&] {
      if (next < end) {
        find_rows(next, begin, end, ahead[next_place]);
        prefetch(ahead[next_place]);
      }
      next += kTileTokens;
      next_place = next_place == kTilesAhead ? 0 : next_place + 1;
    };
    for (int64_t tile = next, place = 0; tile < end; tile += kTileTokens) {
      while (next <= tile + kTilesAhead * kTileTokens) fetch_next();
      attend_tile(tile, ahead[place]);
      place = place == kTilesAhead ? 0 : place + 1;
    }
  }

  // ---- one tile
  // -----------------------------------------------------------------------------------------------------
  RowWindow window_of(int64_t position, int64_t tile) const {
    const int64_t begin = first_key(position, params_.window) - tile, end = position + 1 - tile;
    return {static_cast<int>(begin > 0 ? begin : 0), static_cast<int>(end < kTileTokens ? end : kTileTokens),
            static_cast<float>(tile - position)};
  }

  void attend_tile(int64_t tile, const TileRows& rows) {
    // Positions that see some of the tile: from its first token on, until the window has left its last.
    const int64_t first = tile > item_.first_position ? tile : item_.first_position;
    int64_t last = last_position_;
    if (params_.window > 0 && last > tile + kTileTokens - 2 + params_.window)
      last = tile + kTileTokens - 2 + params_.window;
    if (first > last) return;

    auto* keys = reinterpret_cast<typename Tile::Packed*>(scratch_.keys);
    auto* values = reinterpret_cast<typename Tile::Packed*>(scratch_.values);
    Tile::pack_keys(rows.keys, head_dim_, keys);
    Tile::pack_values(rows.values, head_dim_, values);
    const bool uniform = !window_of(first, tile).partial() && !window_of(last, tile).partial();
    if (first == last || uniform || Tile::all_finite(values, head_dim_))
      return attend_positions(tile, first, last);

    // A weight of 0 does not silence an infinity or NaN: each position gets values without those that it must
    // not see.
    for (int64_t position = first; position <= last; ++position) {
      TileRows seen = rows;
      const RowWindow window = window_of(position, tile);
      for (int i = 0; i < kTileTokens; ++i)
        if (i < window.begin || i >= window.end) seen.values[i] = reinterpret_cast<const T*>(kZeroRow);
      Tile::pack_values(seen.values, head_dim_, values);
      attend_positions(tile, position, position);
    }
  }

  void attend_positions(int64_t tile, int64_t first, int64_t last) {
    const int heads = item_.num_heads;
    const int begin = static_cast<int>(first - item_.first_position) * heads;
    const int end = static_cast<int>(last + 1 - item_.first_position) * heads;
    const auto* queries = reinterpret_cast<const typename Tile::Query*>(scratch_.queries);
    const auto* keys = reinterpret_cast<const typename Tile::Packed*>(scratch_.keys);
    const auto* values = reinterpret_cast<const typename Tile::Packed*>(scratch_.values);
    auto* weights = reinterpret_cast<typename Tile::Weight*>(scratch_.weights);
    for_row_blocks(begin, end, [&](int row, auto count) {
      constexpr int kRows = decltype(count)::value;
      Tile::template score<kRows>(queries + row * Tile::query_length(head_dim_), keys, head_dim_,
                                  scratch_.scores);
      float alpha[kRows];
      for (int r = 0; r < kRows; ++r) {
        const int position = (row + r) / heads, head = item_.first_head + (row + r) % heads;
        const float slope = params_.alibi_slopes ? params_.alibi_slopes[head] * kLog2E : 0.0f;
        alpha[r] = update_row<Tile>(rules_, scratch_.scores + r * kTileTokens,
                                    window_of(item_.first_position + position, tile), slope,
                                    scratch_.states[row + r], weights + r * kTileTokens);
      }
      Tile::template accumulate<kRows>(weights, values, alpha, head_dim_, scratch_.outputs + row * width_);
    });
  }

  // ---- results
  // ------------------------------------------------------------------------------------------------------ A
  // part: outputs [rows][head_dim], then max and sum of each row.
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
      const int64_t out_row = item_.first_row + row / item_.num_heads;
      const int head = item_.first_head + row % item_.num_heads;
      if (params_.sinks) add_sink(total, params_.sinks[head], head_dim_);
      write_output(total, head_dim_,
                   static_cast<T*>(params_.out.data) + out_row * params_.out.row_stride +
                       head * params_.out.head_stride);
      if (params_.lse) params_.lse[out_row * batch_.num_heads + head] = log_sum_exp(total);
    }
  }

  const AttentionParams& params_;
  const PagedBatch& batch_;
  const AttentionItem& item_;
  Scratch& scratch_;
  const ScoreRules rules_;
  const int head_dim_, width_, chunk_tokens_;
  const int64_t last_position_;
};

template <class T>
void merge_row_of(const MergeParams& params, int64_t row) {
  float outputs[kMaxHeadDim];
  for (int head = 0; head < params.num_heads; ++head) {
    const auto lse_of = [&](int part) {
      return params
          .lses[part * params.lse_part_stride + row * params.lse_row_stride + head * params.lse_head_stride];
    };
    float max = kMinusInfinity;
    for (int part = 0; part < params.num_parts; ++part) max = lse_of(part) > max ? lse_of(part) : max;
    double sum = 0.0;
    memset(outputs, 0, sizeof outputs);
    for (int part = 0; part < params.num_parts; ++part) {
      if (lse_of(part) == kMinusInfinity) continue;  // no keys: its output is not even read
      const float weight = std::exp(lse_of(part) - max);
      const T* in = static_cast<const T*>(params.outs) + part * params.part_stride + row * params.row_stride +
                    head * params.head_stride;
      sum += weight;
      for (int d = 0; d < params.head_dim; ++d) outputs[d] += weight * widen(in[d]);
    }
    const int64_t index = row * params.num_heads + head;
    write_output({max, static_cast<float>(sum), outputs}, params.head_dim,
                 static_cast<T*>(params.out) + index * params.head_dim);
    params.lse[index] = sum == 0.0 ? kMinusInfinity : static_cast<float>(max + std::log(sum));
  }
}

}  // namespace

size_t attention_scratch_bytes() { return sizeof(Scratch); }

void attend(const AttentionParams& params, const AttentionItem& item, void* scratch) {
  const FpEnvironment environment;
  Scratch& memory = *static_cast<Scratch*>(scratch);
  switch (params.batch.dtype) {
    case DType::kFloat32:
      return ItemAttention<FloatTile, float>(params, item, memory).run();
    case DType::kFloat16:
      return ItemAttention<FloatTile, Half>(params, item, memory).run();
    default:
#if defined(__AVX512BF16__)
      return ItemAttention<BFloatTile, BFloat>(params, item, memory).run();
#else
      return ItemAttention<FloatTile, BFloat>(params, item, memory).run();
#endif
  }
}

void merge_row(const MergeParams& params, int64_t row) {
  const FpEnvironment environment;
  switch (params.dtype) {
    case DType::kFloat32:
      return merge_row_of<float>(params, row);
    case DType::kFloat16:
      return merge_row_of<Half>(params, row);
    default:
      return merge_row_of<BFloat>(params, row);
  }
}

}  // namespace tokenstep::cpu::TOKENSTEP_ISA_NAMESPACE
