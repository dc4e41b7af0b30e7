// From the row to the few tokens that matter: one streaming pass that keeps a maximum per thread, a bound
// from these maxima, and the tokens beyond the bound, read again from L2.
#pragma once
#include "common/sample_results.h"
#include "cuda/sample_histogram.cuh"

namespace tokenstep::cuda {

// Values as ordered bits.
constexpr uint32_t kMinusInfinityKey = 0x007fffffu;
constexpr uint32_t kBadKey = 0xffffffffu;  // NaN or +inf among the logits

// The row's share of this block moves to L2 while the parameters are on their way, which come in a chain of
// loads: slot, parameters, lists, counts.
template <class Block>
__device__ __forceinline__ void prefetch_row(const Block& block) {
  constexpr int kLineUnits = 128 / kUnitBytes;
#pragma unroll 1
  for (int unit = block.first_unit + block.thread * kLineUnits; unit < block.end_unit;
       unit += Block::kThreads * kLineUnits)
    prefetch_l2(block.logits + max(block.id_of(unit, 0), 0));
}

// Parameters and the ends of the row into shared memory. A row without a slot has parameters out of range.
template <class Block>
__device__ __forceinline__ void load_params(Block& block) {
  using Logit = typename Block::Logit;
  constexpr int kPieces = sizeof(RowParams) / sizeof(uint4), kEnds = kWarpSize;  // each in a warp of its own
  static_assert(2 * Block::kUnit <= kWarpSize);
  auto& shared = block.shared;
  const int slot = block.p.row_slots ? block.p.row_slots[block.index] : block.index;
  const bool exists = slot >= 0 && slot < block.p.num_slots;
  if (block.thread < kPieces && exists)
    reinterpret_cast<uint4*>(&shared.params)[block.thread] =
        reinterpret_cast<const uint4*>(block.p.rows + slot)[block.thread];
  if (block.thread == 0) {
    shared.task = {&block.p, &block.args, block.index};
    if (!exists) shared.params = vacant_row();
  }
  if (block.thread >= kEnds && block.thread < kEnds + 2 * Block::kUnit) {
    const int end = (block.thread - kEnds) / Block::kUnit, place = block.thread % Block::kUnit;
    const int id = block.id_of(end ? block.num_units - 1 : 0, place);
    const uint32_t minus_infinity = kMinusInfinityWord<Logit>;
    Logit token;
    memcpy(&token, &minus_infinity, sizeof token);
    if (id >= 0 && id < block.p.vocab_size) token = block.logits[id];
    reinterpret_cast<Logit*>(&shared.row_ends[end])[place] = token;
  }
}

// Bits of the row's mask for 32 tokens from `first_id` on; none outside of the vocabulary.
template <class Block>
__device__ __forceinline__ uint32_t mask_bits(const Block& block, int first_id) {
  if (!block.mask) return 0xffffffffu;
  const int words = (block.p.vocab_size + 31) / 32, word = first_id >> 5;
  const auto at = [&](int i) { return i >= 0 && i < words ? block.mask[i] : 0u; };
  const uint32_t bits = first_id & 31;
  return bits == 0 ? at(word) : __funnelshift_r(at(word), at(word + 1), bits);
}

// Steps 1-4 as a map of the tokens that the stream may take as they are: not masked, and not edited. Edits
// are a handful beside V: their values are worked out one by one, from their lists.
template <class Block>
__device__ __forceinline__ void make_live_map(Block& block) {
  auto& shared = block.shared;
#pragma unroll 1
  for (int bin = block.thread; bin < kBins; bin += Block::kThreads)
    shared.histogram_low[bin] = shared.histogram_high[bin] = 0;
  if (block.thread == 0) {
    shared.list_size = shared.num_hits = 0;
    shared.found_token = -1;
  }
  if (block.has_live_map) {
    const int first_id = block.id_of(block.first_unit, 0);
    const int words = max(0, (block.end_unit - block.first_unit) * Block::kUnit + 31) / 32;
#pragma unroll 1
    for (int word = block.thread; word < words; word += Block::kThreads)
      block.live_map[word] = mask_bits(block, first_id + word * 32);
    __syncthreads();
#pragma unroll 1
    for (int entry = block.thread; entry < block.num_edits; entry += Block::kThreads) {
      const int32_t id = entry < block.num_biases ? block.row().bias_ids[entry]
                                                  : block.row().history_ids[entry - block.num_biases];
      const int bit = id - first_id;
      if (bit >= 0 && bit < words * 32) atomicAnd(&block.live_map[bit / 32], ~(1u << (bit % 32)));
    }
  }
  __syncthreads();
}

// The one pass over the row. What stays are the largest values of each thread, in the block's box, and the
// first of its edits.
template <class Block>
__device__ __forceinline__ void find_row_max(Block& block) {
  using Logit = typename Block::Logit;
  constexpr int kLoadsInFlight = 4, kStep = Block::kThreads;
  uint32_t raw = kMinusInfinityWord<Logit>, live = raw;
  const auto take = [&](const Unit& unit, int at) {
    raw = max_of_words<Logit>(raw, word_max<Logit>(unit));
    if (!block.has_live_map) return;
    uint32_t bits = block.live_tokens(at);
#pragma unroll
    for (int w = 0; w < kUnitWords; ++w, bits >>= kWordTokens<Logit>)
      live = max_of_words<Logit>(live, mask_word<Logit>(unit.word[w], bits));
  };
  // Whole units, without branches: a unit past the end becomes one of the thread's own again, which no
  // maximum minds. (Not another thread's: the bound counts maxima of distinct tokens.)
  const int own = block.first_unit + block.thread;
  const int begin = own == 0 && block.shift > 0 ? own + kStep : own;
  const int end = min(block.end_unit, (block.p.vocab_size + block.shift) / Block::kUnit);
#pragma unroll 1
  for (int first = begin; first < end; first += kLoadsInFlight * kStep) {
    Unit units[kLoadsInFlight];
    int at[kLoadsInFlight];
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) {
      at[i] = first + i * kStep < end ? first + i * kStep : first;
      units[i] = block.load_whole(at[i]);
    }
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) take(units[i], at[i]);
  }
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {  // the ends
    const int at = i ? block.num_units - 1 : 0;
    if (at >= own && at < block.end_unit && (at - own) % kStep == 0 && !block.is_whole(at))
      take(block.shared.row_ends[i], at);
  }
  if (!block.has_live_map) live = raw;

  const float raw_max = max_of_word<Logit>(raw);
  float edited_max = max_of_word<Logit>(live);
  Candidate first_edit = {0.0f, -1};
  if (block.first_edit() < block.num_edits) {
    first_edit = edited_token(block.edited_row(), block.first_edit());
    if (first_edit.id >= 0) edited_max = max_nan(edited_max, first_edit.value);
    block.for_each_edit(block.second_edit(),
                        [&](int32_t, float value) { edited_max = max_nan(edited_max, value); });
  }
  block.shared.edits[block.thread] = first_edit;
  const bool bad = !(raw_max < kInfinity);
  block.own_box().raw_max[block.thread] = bad ? kBadKey : ordered_bits(raw_max);
  block.own_box().edited_max[block.thread] = bad ? kBadKey : ordered_bits(edited_max);
}

// ---- thresholds -----------------------------------------------------------------------------------------
// The largest of the maxima of the threads with this thread's number, one in each block of the group.
template <class Block>
__device__ __forceinline__ uint32_t column_max(const Block& block, bool raw) {
  const uint32_t* own = block.own_max(raw);
  uint32_t largest = 0;
#pragma unroll
  for (int rank = 0; rank < kMaxGroupSize; ++rank) {  // all loads at once: remote ones take long
    if (rank >= block.group.size) break;
    largest = max(largest, block.read_peer(own, rank));
  }
  return largest;
}

// The largest over all threads of the block. A barrier lies between two calls.
template <class Block>
__device__ __forceinline__ uint32_t largest_key(Block& block, uint32_t key) {
  const uint32_t of_warp = __reduce_max_sync(kAllLanes, key);
  if (block.lane == 0) block.shared.warp_keys[block.warp] = of_warp;
  __syncthreads();
  return __reduce_max_sync(kAllLanes, block.lane < Block::kWarps ? block.shared.warp_keys[block.lane] : 0);
}

__device__ __forceinline__ float bins_below_max(const View& view, float value) {
  return mul(sub(view.x_max, value), kBinsPerNat);  // NaN where both are +inf: bin 0
}
__device__ __forceinline__ int bin_of(const View& view, float value) {
  return static_cast<int>(fminf(fmaxf(bins_below_max(view, value), 0.0f), static_cast<float>(kBins - 1)));
}

// The bin down to which tokens must be collected so that the `count` first are among them: the count-th
// largest maximum of the threads bounds the count-th largest token from below.
template <class Block>
__device__ __forceinline__ int find_last_bin(Block& block, const View& view, uint32_t own_column_max,
                                             int count) {
  const auto add = [&](uint32_t key) {
    if (key > kMinusInfinityKey)
      atomicAdd(&block.shared.histogram_low[bin_of(view, block.value_in(view, from_ordered_bits(key)))], 1u);
  };
  if (count <= Block::kThreads / 4) {  // the maxima of columns bound it nearly as well
    add(own_column_max);
  } else {
#pragma unroll 1
    for (int rank = 0; rank < block.group.size; ++rank) add(block.read_peer(block.own_max(view.raw), rank));
  }
  return min(find_crossing(block, false, Target::fixed(static_cast<uint64_t>(count))).bin, kBins - 1);
}

// ---- candidates -----------------------------------------------------------------------------------------
template <class Block>
__device__ __forceinline__ void append_candidate(Block& block, float value, int32_t id) {
  const uint32_t place = atomicAdd(&block.shared.list_size, 1u);
  if (place < kListSize) block.shared.list[place] = {value, id};
  if (place < kFewTokens) block.own_box().few[block.parity][place] = {value, id};
}

// Lists what is left of the view in bins up to view.last_bin. Only threads whose maximum lies there have any.
template <class Block>
__device__ __forceinline__ void collect(Block& block, const View& view) {
  using Logit = typename Block::Logit;
  constexpr int kStep = Block::kThreads;
  auto& shared = block.shared;
  // Every comparison with NaN is false: the open last bin has no end.
  const float end_bin = view.last_bin == kBins - 1 ? not_a_number() : static_cast<float>(view.last_bin + 1);
  const auto reaches = [&](float value) { return !(bins_below_max(view, value) >= end_bin); };
  const auto take = [&](float value, int32_t id) {
    if (reaches(value) && is_kept(value, id, view.cut)) append_candidate(block, value, id);
  };
  const float own_max = block.value_in(view, from_ordered_bits(*block.own_max(view.raw)));
  const bool has_hit = own_max > -kInfinity && reaches(own_max);
  if (has_hit) shared.hits[atomicAdd(&shared.num_hits, 1u)] = static_cast<uint16_t>(block.thread);
  __syncthreads();
  // (thread with a hit) x (unit of that thread), the next one on its way while this one is looked through.
  const int units_per_thread = (block.end_unit - block.first_unit + kStep - 1) / kStep;
  const int items =
      block.end_unit > block.first_unit ? static_cast<int>(shared.num_hits) * units_per_thread : 0;
  const auto unit_of = [&](int item) {
    const int hit = item / units_per_thread;
    return block.first_unit + shared.hits[hit] + (item - hit * units_per_thread) * kStep;
  };
  Unit unit, next_unit = {};
  int at, next = block.end_unit;
  const auto fetch = [&](int item) {
    next = item < items ? unit_of(item) : block.end_unit;
    if (next < block.end_unit) next_unit = block.load(next);
  };
  fetch(block.thread);
#pragma unroll 1
  for (int item = block.thread; item < items; item += kStep) {
    unit = next_unit;
    at = next;
    fetch(item + kStep);
    if (at >= block.end_unit) continue;
    if (!reaches(block.value_in(view, max_of_word<Logit>(word_max<Logit>(unit))))) continue;  // most do not
    const uint32_t tokens = block.tokens_in_view(view, at);
    for_each_token<Logit>(unit, [&](float x, int place) {
      if (tokens >> place & 1) take(block.value_in(view, x), block.id_of(at, place));
    });
  }
  if (view.raw || !has_hit) return;
  const Candidate first_edit = shared.edits[block.thread];
  if (first_edit.id >= 0) take(block.value_in(view, first_edit.value), first_edit.id);
  block.for_each_edit(block.second_edit(),
                      [&](int32_t id, float value) { take(block.value_in(view, value), id); });
}

}  // namespace tokenstep::cuda
