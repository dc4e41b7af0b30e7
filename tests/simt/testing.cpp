// tokenstep._C_simt.testing: the kernels of kernels.cuh on NumPy arrays.
#include <nanobind/stl/array.h>

#include "bind/simt.h"
#include "bind/tensor.h"
#include "simt/launch.h"
#include "tests/simt/kernels.cuh"

namespace nb = nanobind;

namespace tokenstep::bind {
namespace {

// A launch on NumPy arrays, which are all the memory that the kernel may use.
struct Launch {
  simt::LaunchConfig config;

  Launch(const char* name, int blocks, int threads, uint64_t seed) {
    config.name = name;
    config.grid = {static_cast<unsigned>(blocks)};
    config.block = {static_cast<unsigned>(threads)};
    config.seed = seed;
  }
  template <class T>
  T* add(nb::object array, DType dtype, Access access) {
    const Tensor tensor = tensor_from("simt", "array", array, access);
    tensor.expect_dtype({dtype}).expect_contiguous();
    size_t bytes = static_cast<size_t>(bytes_of(dtype));
    for (int i = 0; i < tensor.ndim; ++i) bytes *= static_cast<size_t>(tensor.shape[i]);
    config.buffers.push_back({tensor.data, bytes, access == Access::kWrite});
    return tensor.as<T>();
  }
  template <class T>
  const T* input(nb::object array, DType dtype) {
    return add<T>(array, dtype, Access::kRead);
  }
  template <class T>
  T* output(nb::object array, DType dtype) {
    return add<T>(array, dtype, Access::kWrite);
  }
  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), Args... args) {
    simt::launch(kernel, config, args...);
  }
};

}  // namespace

void register_simt_testing(nb::module_& parent) {
  nb::module_ m = parent.def_submodule("testing", "Small kernels for the tests of the emulator.");
  register_simt_faults(m);
  const auto i32 = DType::kInt32;
  m.def("order_of_arrival", [=](nb::object out, int blocks, int threads, uint64_t seed) {
    Launch launch("order_of_arrival", blocks, threads, seed);
    unsigned tickets = 0;
    launch.config.cooperative = true;
    launch.config.buffers.push_back({&tickets, sizeof tickets});
    launch(cuda::order_of_arrival, launch.output<int>(out, i32), &tickets);
  });
  m.def("positions",
        [=](nb::object out, const std::array<unsigned, 3>& grid, const std::array<unsigned, 3>& block) {
          Launch launch("positions", 1, 1, 0);
          launch.config.grid = {grid[0], grid[1], grid[2]};
          launch.config.block = {block[0], block[1], block[2]};
          launch(cuda::positions, launch.output<int>(out, i32));
        });
  m.def("intrinsics", [=](nb::object x, nb::object out, int threads, uint64_t seed, int split, int width,
                          int argument) {
    Launch launch("intrinsics", 1, threads, seed);
    launch(cuda::intrinsics, launch.input<int>(x, i32), launch.output<int>(out, i32), split, width, argument);
  });
  m.def("block_votes", [=](nb::object x, nb::object out, int threads, uint64_t seed) {
    Launch launch("block_votes", 1, threads, seed);
    launch(cuda::block_votes, launch.input<int>(x, i32), launch.output<int>(out, i32));
  });
  m.def("prefix_sums", [=](nb::object x, nb::object out, int threads, uint64_t seed) {
    Launch launch("prefix_sums", 1, threads, seed);
    const DType dtype = tensor_from("simt", "x", x).dtype;
    launch.config.shared_bytes = static_cast<size_t>(threads * bytes_of(dtype));
    switch (dtype) {
      case DType::kInt8:
        return launch(cuda::prefix_sums<int8_t>, launch.input<int8_t>(x, dtype),
                      launch.output<int8_t>(out, dtype));
      case DType::kInt32:
        return launch(cuda::prefix_sums<int>, launch.input<int>(x, dtype), launch.output<int>(out, dtype));
      case DType::kInt64:
        return launch(cuda::prefix_sums<int64_t>, launch.input<int64_t>(x, dtype),
                      launch.output<int64_t>(out, dtype));
      default:
        throw nb::type_error("int8, int32 or int64");
    }
  });
  m.def("atomics",
        [=](nb::object x, nb::object out, nb::object grid_sum, int blocks, int threads, uint64_t seed) {
          Launch launch("atomics", blocks, threads, seed);
          launch.config.cooperative = true;
          launch.config.shared_bytes = 128;
          launch(cuda::atomics, launch.input<unsigned>(x, DType::kUInt32),
                 launch.output<unsigned long long>(out, DType::kUInt64),
                 launch.output<unsigned>(grid_sum, DType::kUInt32));
        });
  m.def("producer_and_consumer", [=](nb::object x, nb::object out, int threads, int rounds, uint64_t seed) {
    Launch launch("producer_and_consumer", 1, threads, seed);
    launch.config.shared_bytes = static_cast<size_t>(threads) * 2;
    launch(cuda::producer_and_consumer, launch.input<int>(x, i32), launch.output<int>(out, i32), rounds);
  });
  m.def("ring_sum", [=](nb::object x, nb::object out, int threads, int chunks, uint64_t seed) {
    Launch launch("ring_sum", 1, threads, seed);
    launch.config.shared_bytes = static_cast<size_t>(threads) * 48;
    launch(cuda::ring_sum, launch.input<int>(x, i32), launch.output<int>(out, i32), chunks);
  });
  m.def("cluster_sum",
        [=](nb::object x, nb::object out, int blocks, int threads, int cluster, int rounds, uint64_t seed) {
          Launch launch("cluster_sum", blocks, threads, seed);
          launch.config.cluster = static_cast<uint32_t>(cluster);
          launch.config.shared_bytes = static_cast<size_t>(threads) * 4;
          launch(cuda::cluster_sum, launch.input<int>(x, i32), launch.output<int>(out, i32), rounds);
        });
  m.def("grid_sums", [=](nb::object mail, nb::object out, int blocks, int rounds, uint64_t seed) {
    Launch launch("grid_sums", blocks, 32, seed);
    cuda::GridBarrier barrier = {};
    launch.config.cooperative = true;
    launch.config.buffers.push_back({&barrier, sizeof barrier});
    launch(cuda::grid_sums, launch.output<int>(mail, i32), launch.output<int>(out, i32), &barrier, rounds);
  });
  m.def("last_block_adds_up",
        [=](nb::object x, nb::object partial, nb::object out, int blocks, int together, uint64_t seed) {
          Launch launch("last_block_adds_up", blocks, 32, seed);
          unsigned finished = 0;
          launch.config.together = static_cast<uint32_t>(together);
          launch.config.buffers.push_back({&finished, sizeof finished});
          launch(cuda::last_block_adds_up, launch.input<int>(x, i32), launch.output<int>(partial, i32),
                 &finished, launch.output<int>(out, i32));
        });
  m.def("matmul",
        [=](nb::object a, nb::object b, nb::object c, bool bfloat16, bool transposed, uint64_t seed) {
          Launch launch("matmul", 1, 32, seed);
          launch.config.shared_bytes = 48 * 16;
          const auto kernel =
              bfloat16 ? (transposed ? cuda::matmul<__nv_bfloat16, true> : cuda::matmul<__nv_bfloat16, false>)
                       : (transposed ? cuda::matmul<__half, true> : cuda::matmul<__half, false>);
          launch(kernel, launch.input<uint4>(a, DType::kUInt32), launch.input<uint4>(b, DType::kUInt32),
                 launch.output<float>(c, DType::kFloat32));
        });
  m.def("halves", [=](nb::object h, nb::object x, nb::object widened, nb::object narrowed, nb::object most,
                      bool bfloat16) {
    Launch launch("halves", 1, 256, 0);
    const int n = static_cast<int>(tensor_from("simt", "x", x).shape[0]);
    const auto run = [&]<class Half, class Half2>(Half, Half2) {
      launch(cuda::halves<Half, Half2>, launch.input<Half>(h, DType::kUInt8),
             launch.input<float>(x, DType::kFloat32), launch.output<float>(widened, DType::kFloat32),
             launch.output<uint16_t>(narrowed, DType::kUInt8), launch.output<uint16_t>(most, DType::kUInt8),
             n);
    };
    bfloat16 ? run(__nv_bfloat16(), __nv_bfloat162()) : run(__half(), __half2());
  });
}

}  // namespace tokenstep::bind
