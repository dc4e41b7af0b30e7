// The general way, for any number of tokens: descend histograms of values to the cut, then one by place to
// the token. The same code walks the lists or, where they do not hold all that matters (wide nuclei,
// thousands of ties), the row again.
#pragma once
#include "cuda/sample_few.cuh"

namespace tokenstep::cuda {

struct NoChunks {
  __device__ __forceinline__ void operator()(bool, int) const {}
};

// f(value, id) for this thread's share of what is left. end_chunk(true, place) comes to all lanes after 32
// units from `place` on; end_chunk(false, place) after a lone token.
template <class Block, class F, class EndChunk = NoChunks>
__device__ __forceinline__ void for_each_left(const Block& block, const View& view, F f,
                                              EndChunk end_chunk = {}) {
  using Logit = typename Block::Logit;
  if (view.listed) {
    const int size = static_cast<int>(block.shared.list_size);
#pragma unroll 1
    for (int i = block.thread; i < size; i += Block::kThreads) {
      const Candidate token = block.shared.list[i];
      if (!is_kept(token.value, token.id, view.cut)) continue;
      f(token.value, token.id);
      end_chunk(false, token.id + block.shift);
    }
    return;
  }
#pragma unroll 1
  for (int base = block.first_unit + block.warp * kWarpSize; base < block.end_unit; base += Block::kThreads) {
    const int at = base + block.lane;
    if (at < block.end_unit) {
      const uint32_t tokens = block.tokens_in_view(view, at);
      for_each_token<Logit>(block.load(at), [&](float x, int place) {
        const float value = block.value_in(view, x);
        const int32_t id = block.id_of(at, place);
        if ((tokens >> place & 1) && is_kept(value, id, view.cut)) f(value, id);
      });
    }
    end_chunk(true, base * Block::kUnit);
  }
  if (view.raw) return;
  block.for_each_edit(block.first_edit(), [&](int32_t id, float value) {
    value = block.value_in(view, value);
    if (!is_kept(value, id, view.cut)) return;
    f(value, id);
    end_chunk(false, id + block.shift);
  });
}

// What a cut counts: tokens (top-k) or their weights (top-p).
struct Measure {
  bool by_weight;
  float x_max;
  __device__ __forceinline__ uint64_t operator()(float value) const {
    return by_weight ? weight(distance_from_max(value, x_max)) : 1;
  }
};

// The part of the order that the cut has been narrowed to: one bin of values, and of it the keys
// [least, largest].
struct Bracket {
  int bin;
  uint64_t target;  // what the tokens of the bracket up to the cut measure together
  uint32_t least = 0, largest = 0xffffffffu;
};

// The cut among tokens of one value: the first ids.
template <class Block>
__device__ __forceinline__ Cut cut_ties(Block& block, const View& view, uint32_t key, uint64_t count) {
  BinRun<Block> run{block};
  for_each_left(block, view, [&](float value, int32_t id) {
    if (ordered_bits(value) == key) run.add(bin_of_place(id + block.shift), 1);
  });
  run.flush();
  const Crossing crossing = find_crossing(block, true, Target::fixed(count));
  const int first_id = crossing.bin * kTokensPerBin - block.shift;
  for (int i = block.thread; i < places_of_bin<Block>(crossing.bin); i += Block::kThreads) {
    const float value = block.value_of(view, first_id + i);
    if (ordered_bits(value) == key && is_kept(value, first_id + i, view.cut))
      atomicAdd(&block.shared.histogram_low[i], 1u);
  }
  const Crossing place = find_crossing(block, false, Target::fixed(count - crossing.above));
  return {from_ordered_bits(key), first_id + place.bin};
}

// Tokens of the bracket: how many, and the range of their keys. The first kFewTokens of each block are ready
// to be gathered.
template <class Block, class Inside>
__device__ __forceinline__ uint32_t narrow(Block& block, const View& view, Bracket& bracket, Inside inside) {
  auto& shared = block.shared;
  if (block.thread == 0) {
    shared.num_hits = 0;
    shared.least_key = 0xffffffffu;
    shared.largest_key = 0;
  }
  __syncthreads();
  uint32_t least = 0xffffffffu, largest = 0;
  for_each_left(block, view, [&](float value, int32_t id) {
    if (!inside(value)) return;
    const uint32_t key = ordered_bits(value);
    least = min(least, key);
    largest = max(largest, key);
    const uint32_t place = atomicAdd(&shared.num_hits, 1u);
    if (place < kFewTokens) block.own_box().few[block.parity][place] = {value, id};
  });
  least = __reduce_min_sync(kAllLanes, least);
  largest = __reduce_max_sync(kAllLanes, largest);
  if (block.lane == 0) {
    atomicMin(&shared.least_key, least);
    atomicMax(&shared.largest_key, largest);
  }
  __syncthreads();
  if (block.thread == 0) {
    uint32_t* mail = block.own_box().mail[block.parity];
    mail[0] = shared.num_hits;
    mail[1] = shared.least_key;
    mail[2] = shared.largest_key;
  }
  const uint32_t copy = block.share();
  uint32_t count = 0;
  bracket.least = 0xffffffffu;
  bracket.largest = 0;
  for (int rank = 0; rank < block.group.size; ++rank) {
    const uint32_t* mail = block.own_box().mail[copy];
    count += block.read_peer(mail, rank);
    bracket.least = min(bracket.least, block.read_peer(mail + 1, rank));
    bracket.largest = max(bracket.largest, block.read_peer(mail + 2, rank));
  }
  return count;
}

// The cut among few tokens.
template <class Block>
__device__ __forceinline__ Cut cut_bracket(Block& block, const View& view, int count, Measure measure,
                                           uint64_t target) {
  auto& shared = block.shared;
  rank_lists<Block>(suspend(block), view.x_max, count);
#pragma unroll 1
  for (int i = block.thread; i < count; i += Block::kThreads) {
    const Candidate token = shared.few[i];
    const uint64_t before =
        measure.by_weight ? shared.weight_before[i] : static_cast<uint64_t>(shared.few_rank[i]);
    if (before < target && before + measure(token.value) >= target)
      shared.found_cut = {token.value, token.id};
  }
  __syncthreads();
  return shared.found_cut;
}

struct CutFound {
  Cut cut;
  uint32_t parity;
};
template <class Block>
__device__ __noinline__ CutFound search_cut(BlockState state, View view, Measure measure, Target of_all) {
  Block block = resume<Block>(state);
  BinRun<Block> run{block};
  for_each_left(block, view, [&](float value, int32_t) { run.add(bin_of(view, value), measure(value)); });
  run.flush();
  const Crossing crossing = find_crossing(block, true, of_all);
  if (crossing.bin == kBins) return {view.cut, block.parity};  // fewer tokens than asked for
  Bracket bracket{crossing.bin, crossing.target - crossing.above};
  const auto inside = [&](float value) {
    const uint32_t key = ordered_bits(value);
    return bin_of(view, value) == bracket.bin && key >= bracket.least && key <= bracket.largest;
  };
  for (;;) {  // 2^32 keys and 1024 bins: at most four times
    const uint32_t count = narrow(block, view, bracket, inside);
    if (count <= kFewTokens) {
      view.cut = cut_bracket(block, view, static_cast<int>(count), measure, bracket.target);
      break;
    }
    if (bracket.least == bracket.largest) {
      const uint64_t each = measure(from_ordered_bits(bracket.least));
      view.cut = cut_ties(block, view, bracket.least, (bracket.target + each - 1) / each);
      break;
    }
    int bits = 0;  // of a key that a bin does not tell apart
    while ((bracket.largest - bracket.least) >> bits >= kBins) ++bits;
    for_each_left(block, view, [&](float value, int32_t) {
      if (inside(value))
        run.add(static_cast<int>((bracket.largest - ordered_bits(value)) >> bits), measure(value));
    });
    run.flush();
    const Crossing refined = find_crossing(block, true, Target::fixed(bracket.target));
    bracket.target -= refined.above;
    bracket.largest -= static_cast<uint32_t>(refined.bin) << bits;
    const uint32_t span = (1u << bits) - 1;
    if (bracket.largest - bracket.least > span) bracket.least = bracket.largest - span;
  }
  return {view.cut, block.parity};
}

// Step 7 or 8: the shortest prefix of what is left of the view that measures `target`.
template <class Block>
__device__ __forceinline__ Cut find_cut(Block& block, const View& view, Measure measure, Target target) {
  const CutFound found = search_cut<Block>(suspend(block), view, measure, target);
  block.parity = found.parity;
  return found.cut;
}

// The token at `crossing` of a histogram of weights by place, for shared.found_token of the group's first
// block.
template <class Block>
__device__ __forceinline__ void find_token(Block& block, const View& view, const Crossing& crossing) {
  const int first_id = crossing.bin * kTokensPerBin - block.shift;
  const float x_max = block.tempered_late(view.x_max);
  for (int i = block.thread; i < places_of_bin<Block>(crossing.bin); i += Block::kThreads) {
    const float value = block.value_of(view, first_id + i);
    if (is_kept(value, first_id + i, view.cut)) add_to_bin(block, i, block.weight_of(value, x_max));
  }
  const Crossing place = find_crossing(block, false, Target::fixed(crossing.target - crossing.above));
  if (block.thread == 0) block.shared.found_token = first_id + place.bin;
}

// Step 9 from all that is left. Returns its weight.
template <class Block>
__device__ __forceinline__ uint64_t draw_left(Block& block, const View& view, uint64_t bits) {
  uint64_t sum = 0;
  const float x_max = block.tempered_late(view.x_max);
  for_each_left(
      block, view, [&](float value, int32_t) { sum += block.weight_of(value, x_max); },
      [&](bool of_warp, int place) {
        if (of_warp) sum = warp_sum_44(sum);
        if (sum && (!of_warp || block.lane == 0)) add_to_bin(block, bin_of_place(place), sum);
        sum = 0;
      });
  const Crossing crossing = find_crossing(block, true, Target::random(bits));
  if (block.group.rank == 0) find_token(block, view, crossing);
  return crossing.total;
}

// How many of what is left come before a token.
template <class Block>
__device__ __forceinline__ uint64_t count_before(Block& block, const View& view, float value, int32_t id) {
  uint64_t count = 0, none = 0;
  for_each_left(block, view,
                [&](float other, int32_t other_id) { count += comes_before(other, other_id, value, id); });
  block.sum_group(count, none);
  return count;
}

}  // namespace tokenstep::cuda
