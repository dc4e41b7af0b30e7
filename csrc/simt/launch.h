// The emulator: runs CUDA kernels on the CPU, their source unchanged, and finds what they do wrong.
//
//   simt::launch(sample_kernel<float>, {.name = "sample", .grid = {4}, .block = {256}, .seed = 7}, params);
//
// A thread is a fiber (fiber.h); threads run in random order, given by the seed (scheduler.h). Barriers and
// warp-wide operations wait for exactly the threads that they must (barriers.cpp, exchange.h). Every load and
// store is checked, for races too, by what synchronisation orders and not by what happened to run first
// (memory.h, clock.h). A copy by cp.async arrives only when it is waited for (ptx.cpp).
//
// A kernel that breaks a rule of CUDA's programming model raises simt::Error, which names the kernel, the
// block, the thread and the lines; so do deadlocks, wild pointers and stack overflows. The process goes on.
//
// What it does not show: speed, bank conflicts, and values that only a weak memory gives (a race is an error
// whatever its values).
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "simt/vector_types.h"

namespace tokenstep::simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Global memory that a kernel may use.
struct Buffer {
  const void* data;
  size_t bytes;
  bool writable = true;
};

struct LaunchConfig {
  std::string name = "kernel";
  dim3 grid = {1}, block = {1};
  size_t shared_bytes = 0;
  uint32_t cluster = 1;      // blocks along x that share a cluster
  bool cooperative = false;  // all blocks run together, and may wait for one another
  uint32_t together =
      1;              // otherwise, as many do, or a cluster if that is more; the rest follow, in any order
  uint64_t seed = 0;  // of the order in which threads run
  // The kernel may access no global memory but this, if any is given.
  std::vector<Buffer> buffers = {};
};

// A kernel with its arguments, the types erased.
struct Kernel {
  void (*call)(const void* arguments);
  const void* arguments;
  size_t bytes;  // of the arguments
};

void run(const LaunchConfig& config, const Kernel& kernel);

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchConfig& config, Args&&... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<std::decay_t<Params>...> params;
  } const call = {kernel, {static_cast<Args&&>(args)...}};
  run(config, {[](const void* arguments) {  // every thread gets its own copy of the parameters
                 const Call& call = *static_cast<const Call*>(arguments);
                 std::apply(call.kernel, call.params);
               },
               &call, sizeof call});
}

}  // namespace tokenstep::simt
