// tokenstep._C_simt.testing.run: the kernels of faults.cuh, by name.
#include "tests/simt/faults.cuh"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <numeric>

#include "bind/simt.h"
#include "simt/launch.h"

namespace nb = nanobind;

namespace tokenstep::bind {
namespace {

struct KernelPair {
  const char* name;
  void (*right)(cuda::Buffers);
  void (*faulty)(cuda::Buffers);
  simt::LaunchConfig config;
};

std::vector<KernelPair> kernel_pairs() {
#define TOKENSTEP_PAIR(kernel) #kernel, cuda::kernel<false>, cuda::kernel<true>
  const simt::LaunchConfig block = {.block = {64}, .shared_bytes = 64 * 4};  // an int a thread
  const simt::LaunchConfig uneven = {.block = {64}, .shared_bytes = 80 * 4 + 8};
  const simt::LaunchConfig copies = {.block = {64}, .shared_bytes = 64 * 32};  // two cp.async a thread
  const simt::LaunchConfig clusters = {.grid = {4}, .block = {64}, .shared_bytes = 64 * 4, .cluster = 2};
  const simt::LaunchConfig grid = {.grid = {3}, .block = {64}, .cooperative = true};
  return {
      {TOKENSTEP_PAIR(missing_barrier), block},
      {TOKENSTEP_PAIR(missing_barrier_before_reuse), block},
      {TOKENSTEP_PAIR(missing_barrier_after_clearing), block},
      {TOKENSTEP_PAIR(race_between_warps), block},
      {TOKENSTEP_PAIR(shuffle_is_no_barrier), block},
      {TOKENSTEP_PAIR(race_between_halves_of_a_warp), block},
      {TOKENSTEP_PAIR(shared_out_of_bounds), block},
      {TOKENSTEP_PAIR(shared_below_its_start), block},
      {TOKENSTEP_PAIR(shared_across_its_end), uneven},
      {TOKENSTEP_PAIR(shared_memory_that_nobody_wrote), block},
      {TOKENSTEP_PAIR(misaligned), copies},
      {TOKENSTEP_PAIR(divergent_barrier), block},
      {TOKENSTEP_PAIR(barrier_that_one_thread_misses), block},
      {TOKENSTEP_PAIR(named_barrier_of_another_size), block},
      {TOKENSTEP_PAIR(named_barrier_that_a_warp_misses), block},
      {TOKENSTEP_PAIR(divergent_warp), block},
      {TOKENSTEP_PAIR(warp_operation_that_a_lane_misses), block},
      {TOKENSTEP_PAIR(shuffle_from_a_lane_outside_of_the_mask), block},
      {TOKENSTEP_PAIR(mask_without_the_caller), block},
      {TOKENSTEP_PAIR(missing_copy_wait), copies},
      {TOKENSTEP_PAIR(copy_wait_for_too_few_groups), copies},
      {TOKENSTEP_PAIR(missing_barrier_after_copy_wait), copies},
      {TOKENSTEP_PAIR(copies_in_flight_at_the_end), copies},
      {TOKENSTEP_PAIR(missing_cluster_barrier_before_access), clusters},
      {TOKENSTEP_PAIR(missing_cluster_barrier_before_leaving), clusters},
      {TOKENSTEP_PAIR(race_in_a_cluster), clusters},
      {TOKENSTEP_PAIR(block_outside_of_the_cluster), clusters},
      {TOKENSTEP_PAIR(cluster_arrival_without_wait), clusters},
      {TOKENSTEP_PAIR(cluster_wait_without_arrival), clusters},
      {TOKENSTEP_PAIR(missing_fence_before_flag), grid},
      {TOKENSTEP_PAIR(missing_fence_after_flag), grid},
      {TOKENSTEP_PAIR(missing_acquire), grid},
      {TOKENSTEP_PAIR(flag_that_nobody_sets), grid},
      {TOKENSTEP_PAIR(race_on_global_memory), grid},
      {TOKENSTEP_PAIR(global_out_of_bounds), block},
      {TOKENSTEP_PAIR(write_to_read_only_memory), block},
      {TOKENSTEP_PAIR(non_coherent_read_of_what_was_written), block},
      {TOKENSTEP_PAIR(null_pointer), block},
      {TOKENSTEP_PAIR(division_by_zero), block},
      {TOKENSTEP_PAIR(stack_overflow), block},
  };
#undef TOKENSTEP_PAIR
}

std::vector<int> run_pair(const std::string& name, bool fault, uint64_t seed, bool buffers) {
  for (KernelPair& pair : kernel_pairs()) {
    if (pair.name != name) continue;
    std::vector<int> in(cuda::kBufferInts), out(cuda::kBufferInts);
    std::iota(in.begin(), in.end(), 0);
    uint32_t flag = 0;
    pair.config.name = name;
    pair.config.seed = seed;
    if (buffers)
      pair.config.buffers = {
          {in.data(), in.size() * 4, false}, {out.data(), out.size() * 4}, {&flag, sizeof flag}};
    simt::launch(fault ? pair.faulty : pair.right, pair.config, cuda::Buffers{in.data(), out.data(), &flag});
    return out;
  }
  throw nb::key_error(name.c_str());
}

}  // namespace

void register_simt_faults(nb::module_& m) {
  m.def("faults", [] {
    std::vector<std::string> names;
    for (const KernelPair& pair : kernel_pairs()) names.push_back(pair.name);
    return names;
  });
  m.def("run", &run_pair, nb::arg("name"), nb::arg("fault"), nb::arg("seed") = 0, nb::arg("buffers") = true,
        "Runs a kernel of faults.cuh, right or with its fault, and returns its output.");
}

}  // namespace tokenstep::bind
