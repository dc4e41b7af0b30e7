// How many blocks take a row: a choice of speed alone, which no result depends on. It is a function of sizes and
// the device, never of values, so that a launch captured in a CUDA graph stays right.
#pragma once
#include <algorithm>
#include <optional>

#include "cuda/runtime.h"
#include "cuda/sample_types.cuh"

namespace tokenstep::cuda {

// A block of 512 threads takes the 65,536 registers of a multiprocessor at 128 each: one block a multiprocessor.
// 16 warps hide the latency of the stream's four loads in flight.
constexpr int kSampleThreads = 512;

#ifdef TOKENSTEP_SIMT  // smaller blocks are emulated faster; of 512 threads the emulator has some kernels
constexpr int kFewerSampleThreads = 128;
constexpr int kDefaultSampleThreads = kFewerSampleThreads;
#else
constexpr int kDefaultSampleThreads = kSampleThreads;
#endif

constexpr const char* name_of(GroupMode mode) {
  constexpr const char* kNames[] = {"solo", "cluster", "soft"};
  return kNames[static_cast<int>(mode)];
}

struct SampleGeometry {
  GroupMode mode = GroupMode::kSolo;
  int group_size = 1;
  int num_groups = 1;
  int num_threads = kDefaultSampleThreads;
};

// Rows are split as long as multiprocessors are idle, and each thread keeps two loads or more: a split costs
// barriers of the group, about a microsecond each in a cluster, where a block reads 64 KiB in about two.
inline SampleGeometry choose_geometry(int vocab_size, int bytes_per_logit, int num_rows, const DeviceLimits& limits) {
  constexpr int kLeastLoads = 2 * kSampleThreads;
  const int units = vocab_size * bytes_per_logit / 16;
  SampleGeometry geometry;
  int& size = geometry.group_size;
  while (size < kMaxGroupSize && int64_t{2} * size * num_rows <= limits.num_multiprocessors &&
         units / (2 * size) >= kLeastLoads)
    size *= 2;
  geometry.num_groups = num_rows;
  if (size > 1) geometry.mode = limits.has_clusters ? GroupMode::kCluster : GroupMode::kSoft;
  return geometry;
}

// For tests and measurements: another choice for the whole process. Null: the one above.
struct ForcedGeometry {
  GroupMode mode;
  int group_size, num_threads;
};
inline std::optional<ForcedGeometry> forced_geometry;

inline SampleGeometry geometry_for(int vocab_size, int bytes_per_logit, int num_rows, const DeviceLimits& limits) {
  if (!forced_geometry) return choose_geometry(vocab_size, bytes_per_logit, num_rows, limits);
  const auto [mode, size, threads] = *forced_geometry;
  // Soft groups must all be resident, and take several rows each if there are more.
  const int groups = mode == GroupMode::kSoft ? std::min(num_rows, std::max(1, limits.num_multiprocessors / size))
                                              : num_rows;
  return {mode, size, groups, threads};
}

}  // namespace tokenstep::cuda
