// Tiles, warps, stages and blocks of the attention kernel: what is chosen, and why. Nothing here depends on
// lengths or on other sequences, and of what a query's bits depend on (tile, warps) all is fixed by head_dim
// and dtype: the rest is speed alone.
#pragma once
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <optional>

#include "cuda/runtime.h"

namespace tokenstep::cuda {

// ---- what bits depend on ----------------------------------------------------------------------------------
// Head sizes that models have (64, 80, 96, 112, 128, 192, 256) have a kernel each: attention_float16.cu and
// its like. Others take the next larger one, whose remaining dimensions are zeros in shared memory and are
// not read. Caches of one byte have three sizes: a row of theirs has half the bytes and the same arithmetic,
// and a kernel for each of three types of queries. float32 is for tests and small models: three sizes, and
// no tensor cores.

// A warp's slice of 16 tokens is 4 KB of keys and values at D = 64 in 16 bits, 16 KB at 256. Four warps give
// a block 64 tokens a step, which divide every chunk (128 tokens at least), and their registers (up to 255 of
// each of 128 threads: 16 x D outputs, 16 x D queries, fragments) fit twice into a multiprocessor's 65,536.
// float32 beyond 128 dimensions: a slice is up to 32 KB, and the results of four warps are 66 KB beside the
// queries' 16: they would not fit the 99 KB of sm_86, sm_89 and sm_120.
constexpr int attention_warps(int head_dim, int bytes_per_element) {  // of queries
  return head_dim * bytes_per_element > 512 ? 2 : 4;
}

// ---- speed alone ------------------------------------------------------------------------------------------
struct AttentionGeometry {
  int blocks_per_multiprocessor;
  int stages;  // slices of a warp's ring
};

// Two blocks a multiprocessor before more stages: while one merges, scans or starts, the other streams. What
// must be on its way to keep memory busy is bandwidth x latency: 3.35 TB/s / 132 x 0.8 us = 20 KB a
// multiprocessor on an H100, 6 KB on an RTX 4090 (1 TB/s / 128). At D = 128 a stage of one block's rings is
// 32 KB: one stage of two blocks already exceeds it, as other warps' copies are on their way while one
// computes; a second and third cover the time between a wait and the next copy. At D = 128 this gives, blocks
// x stages:
//   sm_90, sm_100 (228 KB a multiprocessor)    2 x 3
//   sm_80 (164 KB)                             2 x 2
//   sm_86, sm_89, sm_120 (100 KB)              2 x 1
// and at D = 256: 2 x 1, 1 x 2 and 1 x 1.
template <class SharedBytes>
constexpr std::optional<AttentionGeometry> choose_attention_geometry(const SharedBytes& shared_bytes,
                                                                     const DeviceLimits& limits) {
  for (const int blocks : {2, 1})
    for (const int stages : {3, 2, 1}) {
      const int bytes = shared_bytes(stages);
      if (bytes <= limits.shared_per_block &&
          blocks * (bytes + limits.shared_reserved_per_block) <= limits.shared_per_multiprocessor)
        return AttentionGeometry{blocks, stages};
    }
  return std::nullopt;
}

// Shared memory of the architectures, in bytes, with which every kernel is checked when it is compiled.
constexpr DeviceLimits kSharedMemoryOf[] = {
    {132, true, 227 * 1024, 228 * 1024, 1024},   // sm_90, sm_100
    {108, false, 163 * 1024, 164 * 1024, 1024},  // sm_80
    {128, false, 99 * 1024, 100 * 1024, 1024},   // sm_86, sm_89, sm_120
};
template <class SharedBytes>
constexpr bool fits_every_architecture(const SharedBytes& shared_bytes) {
  return std::all_of(std::begin(kSharedMemoryOf), std::end(kSharedMemoryOf), [&](const DeviceLimits& limits) {
    return choose_attention_geometry(shared_bytes, limits).has_value();
  });
}

// Blocks never outnumber what can be resident (they wait for one another where partial results run out of
// slots, and an idle block is a launch for nothing), nor the items that the shapes allow.
constexpr int attention_grid(const AttentionGeometry& geometry, const DeviceLimits& limits,
                             int64_t most_items) {
  const int64_t resident = int64_t{geometry.blocks_per_multiprocessor} * limits.num_multiprocessors;
  return static_cast<int>(std::clamp<int64_t>(most_items, 1, resident));
}

// Slots of partial results: all lanes of one tile, and twice what the blocks work on, so that a block seldom
// waits for others to merge. 16 rows of 256 dimensions are 16.5 KB a slot: 11 MB on an H100, which stay in
// L2.
constexpr int attention_slots(const DeviceLimits& limits, int max_lanes) {
  return max_lanes + 4 * limits.num_multiprocessors;
}

// For tests and measurements: so many blocks and slots instead, for the whole process; 0: as above.
struct ForcedAttention {
  int grid = 0, stages = 0, slots = 0;
};
inline ForcedAttention forced_attention;

}  // namespace tokenstep::cuda
