// CUDA's run-time library as far as the launchers and bindings use it (csrc/cuda/runtime.h), for the
// emulator: its device is a small one of the newest kind, and its memory is the host's.
#include "cuda/runtime.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace tokenstep::cuda {

const DeviceLimits& limits_of(int) {
  static constexpr DeviceLimits kLimits = {.num_multiprocessors = 8,
                                           .has_clusters = true,
                                           .shared_per_block = 227 * 1024,
                                           .shared_per_multiprocessor = 228 * 1024,
                                           .shared_reserved_per_block = 1024};
  return kLimits;
}
int num_devices() { return 1; }
int current_device() { return 0; }
const char* unusable_because() { return nullptr; }
bool is_capturing(const Stream&) { return false; }

void* allocate_zeroed(size_t bytes, const Stream&) {
  void* const memory = std::calloc(bytes, 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}
void deallocate(void* memory, int) { std::free(memory); }
void zero(void* memory, size_t bytes, const Stream&) { memset(memory, 0, bytes); }
void copy_to_device(void* to, const void* from, size_t bytes, const Stream&) { memcpy(to, from, bytes); }
void copy_to_host(void* to, const void* from, size_t bytes, const Stream&) { memcpy(to, from, bytes); }
void* stage(size_t bytes, const Stream& stream) { return allocate_zeroed(bytes, stream); }
void unstage(void* memory, const Stream& stream) { deallocate(memory, stream.device_id); }

}  // namespace tokenstep::cuda
