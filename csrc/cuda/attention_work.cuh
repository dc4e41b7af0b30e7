// How blocks find their work, from seq_lens and query_start on the device: no plan, nothing read by the host.
//
// Every block scans the sequences in pieces of one per thread, and counts their items: (row tile, KV head,
// lane of chunks). Items are numbered through; a block claims the next number, or, if there are no more items
// than blocks, takes that of its own index and touches no counter. The scan costs 4 to 8 bytes a sequence,
// from L2. Claimed numbers ascend, so that whoever waits for an earlier item waits for a block that works on
// it.
#pragma once
#include "cuda/attention_types.cuh"

namespace tokenstep::cuda {

// Lane `index` in the order of the merge, that of the chunks' numbers modulo kMaxLanes: if the lanes go
// around the end, the first is the one whose chunk is a multiple of kMaxLanes.
__device__ __forceinline__ int lane_in_order(const AttentionItem& item, int index) {
  const int around = kMaxLanes - item.chunk_begin % kMaxLanes;  // lanes before the end
  if (around >= item.num_lanes) return index;
  return index < item.num_lanes - around ? index + around : index + around - item.num_lanes;
}

// What one sequence is to the scan.
struct SequenceEntry {
  int length, first_row, num_queries;
};

template <class Shared>
class AttentionWork {
 public:
  __device__ __forceinline__ AttentionWork(const AttentionKernelParams& params)
      : params_(params), batch_(params.op.batch), fixed_(Shared::fixed()) {
    scan();
    fits_one_wave_ = end_entry() == num_entries() && num_items() <= static_cast<int>(gridDim.x) &&
                     num_parts() <= params_.num_slots;
    if (!fits_one_wave_ && threadIdx.x == 0) claimed_ = atomicAdd(&params_.counters->next_item, 1ull);
  }

  // The next item, in shared memory; null: there is none. All threads call this, and are done with the one
  // before.
  __device__ __forceinline__ const AttentionItem* next() {
    unsigned long long number;
    if (fits_one_wave_) {
      if (took_one_) return nullptr;
      took_one_ = true;
      number = blockIdx.x;
    } else {
      if (threadIdx.x == 0) {
        fixed_.claimed = claimed_;
        claimed_ =
            atomicAdd(&params_.counters->next_item, 1ull);  // the one after it: known when it is needed
      }
      __syncthreads();
      number = fixed_.claimed;
    }
    while (number >= items_before_ + static_cast<unsigned>(num_items())) {
      if (end_entry() == num_entries()) return nullptr;
      items_before_ += num_items();
      parts_before_ += num_parts();
      first_entry_ += Shared::kThreads;
      scan();
    }
    describe(static_cast<int>(number - items_before_));
    return &fixed_.item;
  }

  // Whether partial results may have to wait for a slot.
  __device__ __forceinline__ bool reuses_slots() const { return !fits_one_wave_; }

  // After the last item: the last block to leave puts the counters back to zero.
  __device__ __forceinline__ void finish() {
    if (fits_one_wave_) return;
    if (threadIdx.x == 0) {  // all are done with the last item: they have met in next()
      __threadfence();       // what the block did is known before it counts as finished
      fixed_.arrival = atomicAdd(&params_.counters->num_finished, 1u);
      __threadfence();
    }
    __syncthreads();
    if (fixed_.arrival != gridDim.x - 1) return;
    const unsigned long long parts = parts_before_ + num_parts();
    const int used =
        parts < static_cast<unsigned>(params_.num_slots) ? static_cast<int>(parts) : params_.num_slots;
    for (int slot = static_cast<int>(threadIdx.x); slot < used; slot += Shared::kThreads)
      params_.slot_uses[slot] = 0;
    if (threadIdx.x == 0) {
      params_.counters->next_item = 0;
      params_.counters->num_finished = 0;
    }
  }

 private:
  // Rows of no sequence are the last entry's.
  __device__ __forceinline__ int num_entries() const {
    return batch_.num_sequences + (batch_.query_start ? 1 : 0);
  }
  __device__ __forceinline__ int end_entry() const {
    return min(first_entry_ + Shared::kThreads, num_entries());
  }
  __device__ __forceinline__ int num_items() const { return fixed_.items_before[Shared::kThreads]; }
  __device__ __forceinline__ int num_parts() const { return fixed_.slots_before[Shared::kThreads]; }

  __device__ __forceinline__ SequenceEntry read_entry(int index) const {
    if (index >= batch_.num_sequences) return {0, 0, 0};
    SequenceEntry entry = {__ldg(batch_.seq_lens + index), index, 1};
    bool bad = entry.length < 0 || entry.length > int64_t{batch_.max_blocks} * batch_.block_size;
    if (batch_.query_start) {
      const int64_t begin = __ldg(batch_.query_start + index), end = __ldg(batch_.query_start + index + 1);
      bad |= begin < 0 || end < begin || end > batch_.num_queries || end - begin > batch_.max_query_len;
      entry.first_row = static_cast<int>(begin < 0 ? 0 : min(begin, int64_t{batch_.num_queries}));
      entry.num_queries =
          static_cast<int>(max(min(end, int64_t{batch_.num_queries}) - entry.first_row, int64_t{0}));
    }
    bad |= entry.length > 0 && entry.length < entry.num_queries;
    bad |= batch_.rope.cos && entry.num_queries > 0 && entry.length > batch_.rope.max_position;
    if (bad) entry.length = -1;
    return entry;
  }

  // Chunks, tiles and lanes of a sequence that has keys and queries.
  __device__ __forceinline__ void measure(AttentionItem& item) const {
    const int chunk = params_.chunk_tokens;
    const int64_t first_seen = first_key(item.length - item.num_queries, params_.op.window);
    item.chunk_begin = static_cast<int>(first_seen) / chunk;
    item.chunk_end = (item.length - 1) / chunk + 1;
    item.num_tiles = (item.num_queries * params_.group + kTileRows - 1) / kTileRows;
    item.num_lanes = min(item.chunk_end - item.chunk_begin, kMaxLanes);
    item.kind = item.num_tiles <= kMaxSpreadTiles ? ItemKind::kLane : ItemKind::kAllLanes;
  }
  __device__ __forceinline__ static bool is_empty(const SequenceEntry& entry) {
    return entry.length <= 0 || entry.num_queries == 0;
  }

  __device__ __forceinline__ void scan() {
    const int thread = static_cast<int>(threadIdx.x), index = first_entry_ + thread;
    int items = 0, parts = 0;
    if (index < num_entries()) {
      const SequenceEntry entry = read_entry(index);
      fixed_.length[thread] = entry.length;
      fixed_.first_row[thread] = entry.first_row;
      fixed_.num_queries[thread] = entry.num_queries;
      items = batch_.num_kv_heads;
      if (!is_empty(entry)) {
        AttentionItem item;
        item.length = entry.length;
        item.num_queries = entry.num_queries;
        measure(item);
        items *= item.num_tiles;
        if (item.kind == ItemKind::kLane) items *= item.num_lanes;
        if (item.kind == ItemKind::kLane && item.num_lanes > 1) parts = items;
      }
    }
    const int items_to_here = warp_inclusive_sum(items), parts_to_here = warp_inclusive_sum(parts);
    if (lane_id() == kWarpSize - 1) {
      fixed_.warp_items[warp_id()] = items_to_here;
      fixed_.warp_slots[warp_id()] = parts_to_here;
    }
    __syncthreads();
    int items_of_warps = 0, parts_of_warps = 0;
    for (int warp = 0; warp < warp_id(); ++warp) {
      items_of_warps += fixed_.warp_items[warp];
      parts_of_warps += fixed_.warp_slots[warp];
    }
    fixed_.items_before[thread + 1] = items_of_warps + items_to_here;
    fixed_.slots_before[thread + 1] = parts_of_warps + parts_to_here;
    if (thread == 0) fixed_.items_before[0] = fixed_.slots_before[0] = 0;
    __syncthreads();
  }

  // Item `number` of the entries that were scanned last: by the thread whose entry has it.
  __device__ __forceinline__ void describe(int number) {
    const int thread = static_cast<int>(threadIdx.x);
    if (fixed_.items_before[thread] <= number && number < fixed_.items_before[thread + 1])
      describe_item(thread, number - fixed_.items_before[thread], fixed_.item);
    __syncthreads();
  }
  __device__ __forceinline__ void describe_item(int entry, int number, AttentionItem& item) const {
    item.sequence = first_entry_ + entry;
    item.length = fixed_.length[entry];
    item.first_row = fixed_.first_row[entry];
    item.num_queries = fixed_.num_queries[entry];
    item.kv_head = number;
    item.kind = ItemKind::kClear;
    if (is_empty({item.length, item.first_row, item.num_queries})) return;
    measure(item);
    // Lanes of a tile follow one another, and the tiles that see most come first.
    item.lane = 0;
    if (item.kind == ItemKind::kLane) {
      item.first_part = parts_before_ + fixed_.slots_before[entry] + number / item.num_lanes * item.num_lanes;
      item.lane = number % item.num_lanes;
      number /= item.num_lanes;
    }
    item.kv_head = number % batch_.num_kv_heads;
    item.tile = item.num_tiles - 1 - number / batch_.num_kv_heads;
  }

  const AttentionKernelParams& params_;
  const PagedBatch& batch_;
  typename Shared::Fixed& fixed_;
  unsigned long long items_before_ = 0, parts_before_ = 0;  // of the entries scanned earlier
  unsigned long long claimed_ = 0;                          // of thread 0
  int first_entry_ = 0;
  bool fits_one_wave_ = false, took_one_ = false;
};

}  // namespace tokenstep::cuda
