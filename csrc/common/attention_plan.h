// How paged attention cuts a sequence: the one decision that its bits depend on, shared by CPU and CUDA.
//
// The keys of a sequence are cut into chunks at multiples of chunk_tokens(), counted from position 0 whatever
// the window. A chunk is the unit that a thread (CPU) or a block (CUDA) computes alone; partial results are
// merged in index order. Chunk sizes depend on the head dimension and the cache's type alone, never on
// lengths, batch or processors: a query then has the same bits alone, in any batch and in any prefill.
#pragma once
#include <cstdint>

#include "common/dtype.h"

#ifdef __CUDACC__
#define TOKENSTEP_HOST_DEVICE __host__ __device__
#else
#define TOKENSTEP_HOST_DEVICE
#endif

namespace tokenstep {

// One chunk reads about 64 KB of keys and as much of values: some 10 µs on one CPU core, 3 to 5 µs on one SM,
// an order above the cost of handing out a work item, while a context of 4k tokens still gives 8 (D = 64) to
// 32 (D = 256) of them.
constexpr int64_t kChunkKeyBytes = 64 * 1024;
// Short rows: beyond 512 tokens a single sequence would leave processors idle. (D = 64 in 16 bits has exactly
// 512.)
constexpr int kMaxChunkTokens = 512;
// Long rows: a chunk leaves group * (D + 2) floats to merge; under 128 tokens that is more than 1/8 of what
// it read.
constexpr int kMinChunkTokens = 128;

// D = 64: 512 tokens in 8 or 16 bits, 256 in float32. D = 80 ... 128: 512, 256 and 128. D > 128: 256, else
// 128.
constexpr int chunk_tokens(int head_dim, DType cache_dtype) {
  int tokens = kMaxChunkTokens;
  while (tokens > kMinChunkTokens && int64_t{tokens} * head_dim * bytes_of(cache_dtype) > kChunkKeyBytes)
    tokens /= 2;
  return tokens;
}
static_assert(chunk_tokens(64, DType::kBFloat16) == 512 && chunk_tokens(64, DType::kFloat32) == 256);
static_assert(chunk_tokens(128, DType::kBFloat16) == 256 && chunk_tokens(256, DType::kBFloat16) == 128);
static_assert(chunk_tokens(128, DType::kInt8) == 512 && chunk_tokens(256, DType::kFloat8E4M3) == 256);

// Keys that the query at `position` sees: [first_key, position].
TOKENSTEP_HOST_DEVICE constexpr int64_t first_key(int64_t position, int32_t window) {
  return window > 0 && position >= window ? position - window + 1 : 0;
}

}  // namespace tokenstep
