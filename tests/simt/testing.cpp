// Python access to the kernels of this folder: tokenstep._C_simt.testing.
#include "bind/simt.h"
#include "simt/launch.h"
#include "tests/simt/kernels.cuh"

namespace nb = nanobind;

namespace tokenstep::bind {

void register_simt_testing(nb::module_& parent) {
  nb::module_ m = parent.def_submodule("testing", "Small kernels for the tests of the emulator.");
  m.def("block_sum", [](int blocks, int threads, int n, uint64_t seed) {
    std::vector<float> x(static_cast<size_t>(blocks * n)), out(static_cast<size_t>(blocks));
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 13);
    simt::launch(cuda::block_sum,
                 {.name = "block_sum",
                  .grid = {unsigned(blocks)},
                  .block = {unsigned(threads)},
                  .shared_bytes = 128,
                  .seed = seed,
                  .buffers = {{x.data(), x.size() * 4, false}, {out.data(), out.size() * 4}}},
                 x.data(), out.data(), n);
    nb::list sums;
    for (float s : out) sums.append(s);
    return sums;
  });
}

}  // namespace tokenstep::bind
