// Paged attention on the CPU, the host's part: which items there are, and which thread does which. Nothing
// here changes a bit.
#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "common/attention_plan.h"
#include "cpu/attention_item.h"
#include "cpu/parallel.h"

namespace tokenstep::cpu {
namespace {

// Below this many bytes of keys and values, waking a second thread costs more than it brings.
constexpr int64_t kMinParallelBytes = 256 * 1024;

struct AlignedFree {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, AlignedFree>;

Memory allocate(size_t bytes) {
  Memory memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// Bytes of one token's keys that an item reads: enough heads side by side for memory to be read in long
// pieces, few enough for the tiles at work to stay in L2.
constexpr int kItemTokenBytes = 2048;

// One sequence's items: (query tile x heads) if its queries fill several tiles, else (chunk x heads), where
// heads are those of heads_per_item KV heads, or if their group exceeds kMaxItemRows, that many of it.
struct SequenceItems {
  int64_t first_item;
  int sequence;
  int64_t first_row, first_position;
  int num_queries, positions_per_tile, query_tiles;
  int kv_heads_per_item, head_items;
  int64_t chunk_begin, num_chunks;
  int64_t parts_offset, arrivals_offset;  // of its first heads; used if chunks are spread over items
};

class Plan {
 public:
  Plan(const AttentionParams& params, const int32_t* status)
      : params_(params),
        kv_heads_(params.batch.num_kv_heads),
        group_(params.batch.num_heads / params.batch.num_kv_heads),
        heads_per_kv_head_(std::min(group_, kMaxItemRows)),
        items_per_kv_head_((group_ + heads_per_kv_head_ - 1) / heads_per_kv_head_),
        chunk_(chunk_tokens(params.batch.head_dim, params.batch.cache_dtype)) {
    const PagedBatch& batch = params.batch;
    const int64_t key_bytes = 2 * batch.head_dim * bytes_of(batch.cache_dtype) * batch.num_kv_heads;
    for (int r = 0; r < batch.num_sequences; ++r) add_sequence(r, status[r]);
    parallel_ = num_threads() > 1 && keys_read_ * key_bytes >= kMinParallelBytes;
    const int most_kv_heads = parallel_ ? balanced_kv_heads() : kv_heads_;
    for (SequenceItems& items : sequences_) number_items(items, most_kv_heads);
    if (num_arrivals_ > 0) {
      parts_ = allocate(static_cast<size_t>(num_part_floats_) * sizeof(float));
      arrivals_.assign(static_cast<size_t>(num_arrivals_), 0);
    }
  }

  bool parallel() const { return parallel_; }
  int num_items() const { return static_cast<int>(num_items_); }

  AttentionItem item(int index) {
    const auto after = std::upper_bound(sequences_.begin(), sequences_.end(), index,
                                        [](int64_t i, const SequenceItems& s) { return i < s.first_item; });
    const SequenceItems& s = *std::prev(after);
    const int64_t within = index - s.first_item, part = within / s.head_items;
    const int heads = static_cast<int>(within % s.head_items);
    const bool spread = spreads_chunks(s);
    const int tile =
        spread ? 0 : s.query_tiles - 1 - static_cast<int>(part);  // the tiles that see most come first
    const int first_query = tile * s.positions_per_tile;

    AttentionItem item;
    item.first_row = s.first_row + first_query;
    item.first_position = s.first_position + first_query;
    item.num_positions = std::min(s.positions_per_tile, s.num_queries - first_query);
    item.sequence = s.sequence;
    item.kv_head = heads / items_per_kv_head_ * s.kv_heads_per_item;
    item.num_kv_heads = std::min(s.kv_heads_per_item, kv_heads_ - item.kv_head);
    const int first_in_group = heads % items_per_kv_head_ * heads_per_kv_head_;
    item.first_head = item.kv_head * group_ + first_in_group;
    item.heads_per_kv_head = std::min(heads_per_kv_head_, group_ - first_in_group);
    item.chunk_begin = first_key(item.first_position, params_.window) / chunk_;
    item.chunk_end = (item.first_position + item.num_positions - 1) / chunk_ + 1;
    if (spread) {
      item.chunk_begin = s.chunk_begin + part;
      item.chunk_end = item.chunk_begin + 1;
      item.parts = static_cast<float*>(parts_.get()) + s.parts_offset +
                   s.num_chunks * part_floats(item.first_head * s.num_queries, params_.batch.head_dim);
      item.arrivals = arrivals_.data() + s.arrivals_offset + heads;
      item.num_parts = static_cast<int>(s.num_chunks);
      item.part = static_cast<int>(part);
    }
    return item;
  }

 private:
  void add_sequence(int r, int32_t status) {
    const PagedBatch& batch = params_.batch;
    const int64_t first_row = batch.query_start ? batch.query_start[r] : r;
    const int num_queries = batch.query_start ? batch.query_start[r + 1] - batch.query_start[r] : 1;
    const int64_t length = batch.seq_lens[r];
    if (status != static_cast<int32_t>(AttentionStatus::kOk) || length == 0 || num_queries == 0) return;
    SequenceItems items{};
    items.sequence = r;
    items.first_row = first_row;
    items.first_position = length - num_queries;
    items.num_queries = num_queries;
    items.positions_per_tile = std::min(num_queries, kMaxItemRows / heads_per_kv_head_);
    items.query_tiles = (num_queries + items.positions_per_tile - 1) / items.positions_per_tile;
    const int64_t seen_first = first_key(items.first_position, params_.window);
    items.chunk_begin = seen_first / chunk_;
    items.num_chunks = (length - 1) / chunk_ + 1 - items.chunk_begin;
    sequences_.push_back(items);
    keys_read_ += (length - seen_first) * items.query_tiles;
    num_chunks_ += items.query_tiles == 1 ? items.num_chunks : 0;
  }

  // As many KV heads to an item as leave the threads evenly loaded: they take the same time each, but for
  // ragged ends.
  int balanced_kv_heads() const {
    const int64_t threads = num_threads();
    for (int heads = fitting_kv_heads(1); heads > 1; --heads) {
      const int64_t items = num_chunks_ * ((kv_heads_ + heads - 1) / heads);
      const int64_t longest = (items + threads - 1) / threads * heads;
      if (longest * threads * 8 <= num_chunks_ * kv_heads_ * 9) return heads;
    }
    return 1;
  }

  int fitting_kv_heads(int positions) const {
    const int token_bytes = params_.batch.head_dim * bytes_of(params_.batch.cache_dtype);
    const int fitting =
        std::min(kItemTokenBytes / token_bytes, kMaxItemRows / (positions * heads_per_kv_head_));
    return std::clamp(fitting, 1, kv_heads_);
  }

  bool spreads_chunks(const SequenceItems& s) const {
    return parallel_ && s.query_tiles == 1 && s.num_chunks > 1;
  }

  void number_items(SequenceItems& s, int most_kv_heads) {
    const PagedBatch& batch = params_.batch;
    s.kv_heads_per_item = std::min(fitting_kv_heads(s.positions_per_tile), most_kv_heads);
    s.head_items = (kv_heads_ + s.kv_heads_per_item - 1) / s.kv_heads_per_item * items_per_kv_head_;
    s.first_item = num_items_;
    const bool spread = spreads_chunks(s);
    num_items_ += s.head_items * (spread ? s.num_chunks : s.query_tiles);
    if (!spread) return;
    s.parts_offset = num_part_floats_;
    s.arrivals_offset = num_arrivals_;
    num_part_floats_ += s.num_chunks * part_floats(batch.num_heads * s.num_queries, batch.head_dim);
    num_arrivals_ += s.head_items;
  }

  const AttentionParams& params_;
  const int kv_heads_, group_, heads_per_kv_head_, items_per_kv_head_, chunk_;
  std::vector<SequenceItems> sequences_;
  std::vector<int32_t> arrivals_;
  Memory parts_;
  int64_t keys_read_ = 0, num_chunks_ = 0, num_items_ = 0, num_part_floats_ = 0, num_arrivals_ = 0;
  bool parallel_ = false;
};

void* thread_scratch() {
  const size_t bytes = TOKENSTEP_DISPATCH_ISA(attention_scratch_bytes);
  thread_local Memory memory;
  thread_local size_t capacity = 0;
  if (capacity < bytes) {
    memory = allocate(bytes);
    capacity = bytes;
  }
  return memory.get();
}

void clear_rows(const AttentionParams& params, int64_t begin, int64_t end) {
  const PagedBatch& batch = params.batch;
  const size_t bytes = static_cast<size_t>(bytes_of(batch.dtype));
  for (int64_t row = begin; row < end; ++row)
    for (int64_t head = 0; head < batch.num_heads; ++head) {
      const int64_t offset = row * params.out.row_stride + head * params.out.head_stride;
      std::memset(static_cast<char*>(params.out.data) + offset * static_cast<int64_t>(bytes), 0,
                  batch.head_dim * bytes);
      if (params.lse) params.lse[row * batch.num_heads + head] = -__builtin_inff();
    }
}

// Rows that see no key: of sequences without tokens or with a bad status, and rows of no sequence.
void clear_unseeing_rows(const AttentionParams& params, const int32_t* status) {
  const PagedBatch& batch = params.batch;
  int64_t row = 0;
  for (int r = 0; r < batch.num_sequences; ++r) {
    const int64_t begin = batch.query_start ? batch.query_start[r] : r;
    const int64_t end = batch.query_start ? batch.query_start[r + 1] : r + 1;
    clear_rows(params, row, begin);
    if (batch.seq_lens[r] == 0 || status[r] != static_cast<int32_t>(AttentionStatus::kOk))
      clear_rows(params, begin, end);
    row = end;
  }
  clear_rows(params, row, batch.num_queries);
}

}  // namespace

void paged_attention(const AttentionParams& params, const int32_t* status) {
  active_isa();
  if (params.batch.new_k.data) {
    PagedBatch append = params.batch;
    append.q = {};  // the caller's q stays as it is: the kernel rotates its own copy
    append_kv(append, status);
  }
  clear_unseeing_rows(params, status);
  Plan plan(params, status);
  // Each thread has claimed its next item while it works on one: the kernel then fetches its first keys
  // early.
  std::atomic<int> unclaimed{0};
  const auto attend_items = [&](int) {
    int index = unclaimed++;
    if (index >= plan.num_items()) return;
    void* scratch = thread_scratch();
    for (AttentionItem item = plan.item(index), next;; item = next) {
      index = unclaimed++;
      const bool more = index < plan.num_items();
      if (more) next = plan.item(index);
      TOKENSTEP_DISPATCH_ISA(attend, params, item, more ? &next : nullptr, scratch);
      if (!more) return;
    }
  };
  parallel_for(plan.parallel() ? std::min(plan.num_items(), num_threads()) : 1, attend_items);
}

void merge_attention(const MergeParams& params) {
  active_isa();
  const int64_t row_bytes =
      int64_t{params.num_parts} * params.num_heads * params.head_dim * bytes_of(params.dtype);
  const int64_t runs = std::min<int64_t>(params.num_queries, 4 * num_threads());
  if (params.num_queries * row_bytes < kMinParallelBytes) {
    for (int row = 0; row < params.num_queries; ++row) TOKENSTEP_DISPATCH_ISA(merge_row, params, row);
    return;
  }
  parallel_for(static_cast<int>(runs), [&](int run) {
    const int64_t end = params.num_queries * (run + 1) / runs;
    for (int64_t row = params.num_queries * run / runs; row < end; ++row)
      TOKENSTEP_DISPATCH_ISA(merge_row, params, row);
  });
}

}  // namespace tokenstep::cpu
