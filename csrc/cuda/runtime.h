// What launchers and bindings need of CUDA's run-time library: runtime.cu calls it, csrc/simt/runtime.cpp
// stands in for it in the emulator. Errors are std::runtime_error.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tokenstep::cuda {

constexpr int kMaxDevices = 64;

// Where work goes; work of one stream runs in the order in which it was given.
struct Stream {
  int device_id = 0;
  void* handle = nullptr;  // cudaStream_t
};

struct DeviceLimits {
  int num_multiprocessors;
  bool has_clusters;  // sm_90 and later
  // Shared memory, in bytes: the most of a block, of a multiprocessor, and what of it each block costs beside
  // its own.
  int shared_per_block, shared_per_multiprocessor, shared_reserved_per_block;
};
const DeviceLimits& limits_of(int device_id);  // asked for once

// Why no GPU can be used; null if one can.
const char* unusable_because();
int num_devices();
int current_device();

bool is_capturing(const Stream& stream);

// ---- memory of the device -------------------------------------------------------------------------------
void* allocate_zeroed(size_t bytes, const Stream& stream);
void deallocate(void* memory, int device_id);  // waits for all that uses it
void zero(void* memory, size_t bytes, const Stream& stream);
void copy_to_device(void* to, const void* from, size_t bytes,
                    const Stream& stream);  // `from` is free on return
void copy_to_host(void* to, const void* from, size_t bytes, const Stream& stream);  // waits for the stream

// Host memory that the device can read, to be given back behind the work that reads it: it is used again once
// the stream has come there.
void* stage(size_t bytes, const Stream& stream);
void unstage(void* memory, const Stream& stream);

}  // namespace tokenstep::cuda
