// A block at work on its share of a row: where the row lies, what its edits are, and values of single tokens.
//
// A row is read in units of 16 aligned bytes; unit u belongs to thread (u - first_unit) % kThreads wherever
// the row is walked. Token i of unit u has the place u * kUnitTokens + i and the id place - shift: a row that
// does not begin at a multiple of 16 bytes begins within its first unit. The units at its ends, which other
// memory shares, are taken from a copy.
//
// Long or rare pieces are kept out of line: instructions are many here beside the work of a row, and a cold
// instruction cache is refilled at a few bytes a cycle.
#pragma once
#include "cuda/logits.cuh"
#include "cuda/sample_group.cuh"

namespace tokenstep::cuda {

// What single tokens are looked up in.
template <class Logit, bool kPreset>
struct EditedRow {
  const RowParams* row;
  const Logit* logits;
  const uint32_t* mask;
  int num_biases, num_edits;  // biases, then history

  __device__ __forceinline__ bool allows(int32_t id) const { return !mask || is_allowed(mask, id); }
  __device__ __forceinline__ float edited(int32_t id, float bias, uint32_t occurred) const {
    return apply_edits(to_float(logits[id]), bias, occurred, *row, kPreset && row->penalty_last_n != 0);
  }
  static __device__ __forceinline__ int find(const int32_t* ids, int count, int32_t id) {
    int low = 0, high = count;
#pragma unroll 1
    while (low < high) {
      const int middle = (low + high) / 2;
      if (ids[middle] < id)
        low = middle + 1;
      else
        high = middle;
    }
    return low < count && ids[low] == id ? low : -1;
  }
  __device__ __forceinline__ uint32_t occurrences_of(int32_t id) const {
    if (num_edits == num_biases) return 0;
    if (row->history_capacity > 0) return row->history_counts[id];
    const int i = find(row->history_ids, row->history_size, id);
    return i < 0 ? 0 : row->history_counts[i];
  }
};

// The value after step 4 of any token, slowly.
template <class Logit, bool kPreset>
__device__ __noinline__ float edited_value_of(EditedRow<Logit, kPreset> r, int32_t id) {
  if (!r.allows(id)) return -kInfinity;
  const int bias = r.find(r.row->bias_ids, r.num_biases, id);
  return r.edited(id, bias < 0 ? kNoBias : r.row->bias_values[bias], r.occurrences_of(id));
}

// Token and value after step 4 of an entry of the edits. The id is -1 if the token is masked, or if it comes
// again: the history's entry of a token with a bias.
template <class Logit, bool kPreset>
__device__ __noinline__ Candidate edited_token(EditedRow<Logit, kPreset> r, int entry) {
  const bool is_bias = entry < r.num_biases;
  const int i = is_bias ? entry : entry - r.num_biases;
  const int32_t id = is_bias ? r.row->bias_ids[i] : r.row->history_ids[i];
  if (!r.allows(id) || (!is_bias && r.find(r.row->bias_ids, r.num_biases, id) >= 0)) return {0.0f, -1};
  const uint32_t occurred = is_bias ? r.occurrences_of(id) : occurrences(*r.row, i);
  return {r.edited(id, is_bias ? r.row->bias_values[i] : kNoBias, occurred), id};
}

// kPreset: another engine's rules than our own, which kernels learn at run time.
template <class Logit_, int kThreads_, GroupMode kMode_, bool kPreset_>
struct Block {
  using Logit = Logit_;
  static constexpr int kThreads = kThreads_, kWarps = kThreads / kWarpSize, kUnit = kUnitTokens<Logit>;
  static constexpr GroupMode kMode = kMode_;
  static constexpr bool kPreset = kPreset_;
  static constexpr uint32_t kAllTokens = (1u << kUnit) - 1;
  using Shared = SharedState<kThreads, kMode>;
  using OwnBox = Box<kThreads>;

  const SampleParams& p;
  const GroupArgs& args;
  Shared& shared;
  uint32_t* const live_map;
  const Group<kMode> group;
  const int thread, lane, warp;
  uint32_t parity;  // which copy in the box is written next

  // Of the row at work, the same in all threads.
  int index;
  const Logit* logits;
  const uint32_t* mask;
  int shift, first_unit, end_unit, num_units;
  bool has_live_map;          // tokens outside of it are masked or edited
  int num_biases, num_edits;  // biases, then history
  float scale;                // step 5: what values are multiplied by; of a preset, divided

  __device__ __forceinline__ Block(const SampleParams& params, const GroupArgs& group_args)
      : p(params),
        args(group_args),
        shared(*reinterpret_cast<Shared*>(shared_memory())),
        live_map(reinterpret_cast<uint32_t*>(shared_memory() + sizeof(Shared))),
        group(group_args),
        thread(static_cast<int>(threadIdx.x)),
        lane(lane_id()),
        warp(warp_id()),
        parity(0) {}

  __device__ __forceinline__ const RowParams& row() const { return shared.params; }
  __device__ __forceinline__ Rules rules() const {
    return rules_of(kPreset ? p.semantics : Semantics::kTokenstep);
  }
  __device__ __forceinline__ OwnBox& own_box() const {
    if constexpr (kMode == GroupMode::kSoft) return static_cast<OwnBox*>(args.boxes)[blockIdx.x];
    return shared.box[0];
  }
  __device__ __forceinline__ const uint32_t* own_max(bool raw) const {  // of this thread, as ordered bits
    return (raw ? own_box().raw_max : own_box().edited_max) + thread;
  }
  // A word of another block's box, or two, at the place where `own` lies in this block's.
  __device__ __forceinline__ uint32_t read_peer(const uint32_t* own, int rank) const {
    return group.template read<OwnBox>(own, rank);
  }
  __device__ __forceinline__ uint64_t read_peer_pair(const uint32_t* own, int rank) const {
    return read_peer(own, rank) | uint64_t{read_peer(own + 1, rank)} << 32;
  }
  __device__ __forceinline__ void sync_group() const { group.sync(args); }
  // What was written to copy `parity` of the own box can be read by all, at what this returns.
  __device__ __forceinline__ uint32_t share() {
    sync_group();
    parity ^= 1;
    return parity ^ 1;
  }

  // ---- the row ------------------------------------------------------------------------------------------
  // Its geometry, which needs none of its parameters.
  __device__ __forceinline__ void locate(int row_index) {
    index = row_index;
    scale = 1.0f;
    logits = static_cast<const Logit*>(p.logits) + index * p.logits_stride;
    mask = p.token_bitmask ? p.token_bitmask + index * p.token_bitmask_stride : nullptr;
    shift = static_cast<int>(reinterpret_cast<uintptr_t>(logits) % kUnitBytes / sizeof(Logit));
    num_units = (p.vocab_size + shift + kUnit - 1) / kUnit;
    const int share = units_per_block<Logit>(p.vocab_size, group.size);
    first_unit = group.rank * share;
    end_unit = min(first_unit + share, num_units);
  }
  // What follows from its parameters, once they are in shared memory.
  __device__ __forceinline__ void adopt_params() {
    num_biases = row().bias_size;
    num_edits = num_biases + (has_penalties(row()) ? row().history_size : 0);
    has_live_map = mask || num_edits > 0;
  }

  // ---- units --------------------------------------------------------------------------------------------
  __device__ __forceinline__ int id_of(int unit, int place) const { return unit * kUnit + place - shift; }
  __device__ __forceinline__ bool is_whole(int unit) const {
    return id_of(unit, 0) >= 0 && id_of(unit, kUnit) <= p.vocab_size;
  }
  __device__ __forceinline__ Unit load_whole(int unit) const {
    const uint4 words = load_once(logits + id_of(unit, 0));  // apply_logits may write to where they lie
    return {{words.x, words.y, words.z, words.w}};
  }
  __device__ __forceinline__ Unit load(int unit) const {
    return is_whole(unit) ? load_whole(unit) : shared.row_ends[unit > 0];
  }
  // One bit per token of the unit: neither masked nor edited.
  __device__ __forceinline__ uint32_t live_tokens(int unit) const {
    const int bit = (unit - first_unit) * kUnit;
    return has_live_map ? live_map[bit / 32] >> (bit % 32) & kAllTokens : kAllTokens;
  }
  __device__ __forceinline__ uint32_t tokens_in_view(const View& view, int unit) const {
    return view.raw ? kAllTokens : live_tokens(unit);
  }
  __device__ __forceinline__ float value_in(const View& view, float x) const {
    return view.raw ? x : tempered(x);
  }
  // Step 5 where cuts go by it, and where it comes after them: until then the scale is 1.
  __device__ __forceinline__ float tempered(float x) const {
    if constexpr (!kPreset) return apply_temperature(x, scale);
    return rules().tempers_last ? x : divide_by_temperature(x, scale);
  }
  __device__ __forceinline__ float tempered_late(float x) const {
    return rules().tempers_last ? divide_by_temperature(x, scale) : x;
  }
  // `x_max` is tempered_late() already.
  __device__ __forceinline__ uint64_t weight_of(float value, float x_max) const {
    return weight(distance_from_max(tempered_late(value), x_max));
  }

  // ---- single tokens ------------------------------------------------------------------------------------
  __device__ __forceinline__ EditedRow<Logit, kPreset> edited_row() const {
    return {&shared.params, logits, mask, num_biases, num_edits};
  }
  __device__ __forceinline__ float value_of(const View& view, int32_t id) const {
    if (id < 0 || id >= p.vocab_size) return -kInfinity;
    return view.raw ? to_float(logits[id]) : tempered(edited_value_of(edited_row(), id));
  }
  // f(id, value after step 4) for this thread's share of the group's edits, from entry `first` on.
  __device__ __forceinline__ int first_edit() const { return group.rank * kThreads + thread; }
  __device__ __forceinline__ int second_edit() const { return first_edit() + group.size * kThreads; }
  template <class F>
  __device__ __forceinline__ void for_each_edit(int first, F f) const {
#pragma unroll 1
    for (int entry = first; entry < num_edits; entry += group.size * kThreads) {
      const Candidate token = edited_token(edited_row(), entry);
      if (token.id >= 0) f(token.id, token.value);
    }
  }

  // ---- sums over the block or the group -----------------------------------------------------------------
  // Both arguments become their sums over all threads of the block. A barrier lies between two such sums.
  __device__ __forceinline__ void sum_block(uint64_t& a, uint64_t& b) {
    a = warp_sum(a);
    b = warp_sum(b);
    if (lane == 0) {
      shared.warp_sums[0][warp] = a;
      shared.warp_sums[1][warp] = b;
    }
    __syncthreads();
    a = warp_sum(lane < kWarps ? shared.warp_sums[0][lane] : 0);
    b = warp_sum(lane < kWarps ? shared.warp_sums[1][lane] : 0);
  }
  __device__ __forceinline__ void sum_group(uint64_t& a, uint64_t& b) {
    sum_block(a, b);
    if constexpr (kMode == GroupMode::kSolo) return;
    if (thread == 0) {
      uint32_t* mail = own_box().mail[parity];
      mail[0] = static_cast<uint32_t>(a);
      mail[1] = static_cast<uint32_t>(a >> 32);
      mail[2] = static_cast<uint32_t>(b);
      mail[3] = static_cast<uint32_t>(b >> 32);
    }
    const uint32_t copy = share();
    a = b = 0;
    for (int rank = 0; rank < group.size; ++rank) {
      a += read_peer_pair(own_box().mail[copy], rank);
      b += read_peer_pair(own_box().mail[copy] + 2, rank);
    }
  }
};

// What a block hands to a function out of line, by value, beside the task in shared memory: an object whose
// address is taken would be in memory everywhere. The function hands back the parity, if it shares anything.
struct BlockState {
  uint32_t parity;
  float scale;
};
template <class Block>
__device__ __forceinline__ BlockState suspend(const Block& block) {
  return {block.parity, block.scale};
}
template <class Block>
__device__ __forceinline__ Block resume(const BlockState& state) {
  const Task& task = reinterpret_cast<const typename Block::Shared*>(shared_memory())->task;
  Block block(*task.p, *task.args);
  block.locate(task.row);
  block.adopt_params();
  block.scale = state.scale;
  block.parity = state.parity;
  return block;
}

}  // namespace tokenstep::cuda
