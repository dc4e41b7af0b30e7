// A kernel launch, the same for a GPU and for the emulator.
#pragma once
#include "cuda/ptx.cuh"
#include "cuda/runtime.h"

#ifdef TOKENSTEP_SIMT
#include "simt/launch.h"
#else
#include <cuda_runtime.h>

#include <atomic>

#include "cuda/error.h"
#endif

namespace tokenstep::cuda {

struct LaunchConfig {
  const char* name;
  unsigned grid, block;  // blocks, threads of each
  size_t shared_bytes = 0;
  unsigned cluster = 1;
  bool cooperative = false;  // blocks wait for one another: all must be resident at once
};

#ifdef TOKENSTEP_SIMT

// How launches of this thread are emulated; the tests set it.
struct Emulation {
  uint64_t seed = 0;                  // of the order in which threads run; moves on with every launch
  std::vector<simt::Buffer> buffers;  // that kernels may use; none: any memory
  unsigned together = 1;              // blocks that run at once, where they need not
};
inline thread_local Emulation emulation;

template <auto kKernel, class... Args>
void launch(const LaunchConfig& config, const Stream&, const Args&... args) {
  if (config.grid == 0) return;
  simt::launch(kKernel,
               {.name = config.name,
                .grid = {config.grid},
                .block = {config.block},
                .shared_bytes = config.shared_bytes,
                .cluster = config.cluster,
                .cooperative = config.cooperative,
                .together = emulation.together,
                .seed = emulation.seed++,
                .buffers = emulation.buffers},
               args...);
}

#else

// Makes a device the current one, as launches need it, for as long as it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device_id) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device_id) check(cudaSetDevice(device_id), "cudaSetDevice");
    changed_ = before_ != device_id;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// The default limit of dynamic shared memory is 48 KiB a block; more is asked for once per kernel and device.
template <auto kKernel>
void allow_shared_bytes(size_t bytes, int device_id) {
  constexpr size_t kDefault = 48 * 1024;
  static std::atomic<size_t> allowed[kMaxDevices];
  std::atomic<size_t>& limit = allowed[device_id];
  if (bytes <= kDefault || bytes <= limit.load(std::memory_order_relaxed)) return;
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
  limit.store(bytes, std::memory_order_relaxed);
}

template <auto kKernel, class... Args>
void launch(const LaunchConfig& config, const Stream& stream, const Args&... args) {
  if (config.grid == 0) return;
  const CurrentDevice current(stream.device_id);
  allow_shared_bytes<kKernel>(config.shared_bytes, stream.device_id);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(config.grid);
  launch.blockDim = dim3(config.block);
  launch.dynamicSmemBytes = config.shared_bytes;
  launch.stream = static_cast<cudaStream_t>(stream.handle);
  launch.attrs = attributes;
  if (config.cluster > 1) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[launch.numAttrs++].val.clusterDim = {config.cluster, 1, 1};
  }
  if (config.cooperative) {
    attributes[launch.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[launch.numAttrs++].val.cooperative = 1;
  }
  check(cudaLaunchKernelEx(&launch, kKernel, args...), config.name);
}

#endif

}  // namespace tokenstep::cuda
