#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/runtime.h"

namespace tokenstep::cuda {
namespace {

cudaStream_t handle_of(const Stream& stream) { return static_cast<cudaStream_t>(stream.handle); }

// Pinned blocks. One that is free has an event behind the last work that read it.
class StagingPool {
 public:
  void* take(size_t bytes, int device_id) {
    const std::lock_guard lock(mutex_);
    for (Block& block : blocks_) {
      if (block.in_use || block.device_id != device_id || block.bytes < bytes) continue;
      if (cudaEventQuery(block.passed) != cudaSuccess) continue;
      block.in_use = true;
      return block.memory;
    }
    constexpr size_t kLeastBytes = 64 * 1024;  // most requests share these
    Block block = {nullptr, bytes < kLeastBytes ? kLeastBytes : bytes, device_id, nullptr, true};
    check(cudaMallocHost(&block.memory, block.bytes), "cudaMallocHost");
    check(cudaEventCreateWithFlags(&block.passed, cudaEventDisableTiming), "cudaEventCreate");
    blocks_.push_back(block);
    return block.memory;
  }
  void give_back(void* memory, const Stream& stream) {
    const std::lock_guard lock(mutex_);
    for (Block& block : blocks_) {
      if (block.memory != memory) continue;
      check(cudaEventRecord(block.passed, handle_of(stream)), "cudaEventRecord");
      block.in_use = false;
    }
  }

 private:
  struct Block {
    void* memory;
    size_t bytes;
    int device_id;
    cudaEvent_t passed;
    bool in_use;
  };
  std::mutex mutex_;
  std::vector<Block> blocks_;
};

StagingPool& staging_pool() {  // never destroyed: the driver may be gone at exit
  static auto* pool = new StagingPool;
  return *pool;
}

DeviceLimits ask_limits(int device_id) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device_id), "cudaDeviceGetAttribute");
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrComputeCapabilityMajor) >= 9,
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          attribute(cudaDevAttrReservedSharedMemoryPerBlock)};
}

}  // namespace

const DeviceLimits& limits_of(int device_id) {
  static std::array<std::once_flag, kMaxDevices> asked;
  static std::array<DeviceLimits, kMaxDevices> limits;
  const auto at = static_cast<size_t>(device_id);
  std::call_once(asked.at(at), [&] { limits[at] = ask_limits(device_id); });
  return limits[at];
}

int num_devices() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

int current_device() {
  int device_id = 0;
  check(cudaGetDevice(&device_id), "cudaGetDevice");
  return device_id;
}

const char* unusable_because() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
  return count > 0 ? nullptr : "no GPU was found";
}

bool is_capturing(const Stream& stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const CurrentDevice current(stream.device_id);
  check(cudaStreamIsCapturing(handle_of(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void* allocate_zeroed(size_t bytes, const Stream& stream) {
  const CurrentDevice current(stream.device_id);
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "cudaMalloc");
  zero(memory, bytes, stream);
  return memory;
}

void deallocate(void* memory, int device_id) {
  int before = 0;
  if (cudaGetDevice(&before) != cudaSuccess || cudaSetDevice(device_id) != cudaSuccess) return;
  cudaFree(memory);  // at exit the driver may be gone: errors have no one to tell
  cudaSetDevice(before);
}

void zero(void* memory, size_t bytes, const Stream& stream) {
  const CurrentDevice current(stream.device_id);
  check(cudaMemsetAsync(memory, 0, bytes, handle_of(stream)), "cudaMemsetAsync");
}

void copy_to_device(void* to, const void* from, size_t bytes, const Stream& stream) {
  if (bytes == 0) return;
  void* const staged = stage(bytes, stream);
  memcpy(staged, from, bytes);
  const CurrentDevice current(stream.device_id);
  check(cudaMemcpyAsync(to, staged, bytes, cudaMemcpyHostToDevice, handle_of(stream)), "cudaMemcpyAsync");
  unstage(staged, stream);
}

void copy_to_host(void* to, const void* from, size_t bytes, const Stream& stream) {
  const CurrentDevice current(stream.device_id);
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, handle_of(stream)), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(handle_of(stream)), "cudaStreamSynchronize");
}

void* stage(size_t bytes, const Stream& stream) {
  const CurrentDevice current(stream.device_id);
  return staging_pool().take(bytes, stream.device_id);
}

void unstage(void* memory, const Stream& stream) {
  const CurrentDevice current(stream.device_id);
  staging_pool().give_back(memory, stream);
}

}  // namespace tokenstep::cuda
