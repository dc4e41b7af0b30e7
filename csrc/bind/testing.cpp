// tokenstep._C.testing: the shared numerics and the tensor caster, one thin function each, so that the tests
// exercise the very code that the kernels use.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <vector>

#include "bind/ops.h"
#include "bind/tensor.h"
#include "common/check.h"
#include "common/numerics.h"
#include "common/quantised.h"
#include "cpu/parallel.h"
#include "cpu/read.h"

namespace tokenstep::bind {
namespace {

// out[i] = f(in[i]) over two one-dimensional NumPy arrays.
template <DType kIn, DType kOut, class In, class Out, class F>
auto elementwise(const char* op, F f) {
  return [op, f](nb::object in, nb::object out) {
    const Tensor x = tensor_from(op, "x", in), y = tensor_from(op, "out", out, Access::kWrite);
    x.expect_dtype({kIn}).expect_ndim(1).expect_contiguous();
    y.expect_dtype({kOut}).expect_shape({x.shape[0]}, "[n]").expect_contiguous();
    for (int64_t i = 0; i < x.shape[0]; ++i) y.as<Out>()[i] = f(x.as<In>()[i]);
  };
}

nb::tuple describe(nb::object array) {
  const Tensor t = tensor_from("testing.describe", "array", array);
  nb::list shape, stride;
  for (int i = 0; i < t.ndim; ++i) {
    shape.append(t.shape[i]);
    stride.append(t.stride[i]);
  }
  return nb::make_tuple(name_of(t.dtype), device_name(t.device_type, t.device_id), nb::tuple(shape),
                        nb::tuple(stride), reinterpret_cast<uintptr_t>(t.data));
}

// One read of an array's bytes on up to num_threads() threads: the time that a memory-bound kernel cannot
// beat.
int32_t read_max(nb::object array) {
  const Tensor t = tensor_from("testing.read_max", "array", array);
  t.expect_contiguous();
  int64_t bytes = bytes_of(t.dtype);
  for (int i = 0; i < t.ndim; ++i) bytes *= t.shape[i];
  const int64_t count = bytes / 4;
  nb::gil_scoped_release release;
  cpu::active_isa();
  const int threads = cpu::num_threads();
  std::vector<int32_t> best(static_cast<size_t>(threads));
  cpu::parallel_for(threads, [&](int i) {
    const int64_t begin = count * i / threads, end = count * (i + 1) / threads;
    best[static_cast<size_t>(i)] = TOKENSTEP_DISPATCH_ISA(read_max, t.as<int32_t>() + begin, end - begin);
  });
  return *std::max_element(best.begin(), best.end());
}

}  // namespace

void register_testing(nb::module_& parent) {
  nb::module_ m = parent.def_submodule("testing", "Shared numerics and the tensor caster, for the tests.");
  m.def("weight", elementwise<DType::kFloat32, DType::kInt64, float, int64_t>(
                      "testing.weight", [](float d) { return static_cast<int64_t>(weight(d)); }));
  m.def("log_weight_sum",
        elementwise<DType::kInt64, DType::kFloat32, int64_t, float>(
            "testing.log_weight_sum", [](int64_t s) { return log_weight_sum(static_cast<uint64_t>(s)); }));
  m.def("log_float", elementwise<DType::kFloat32, DType::kFloat32, float, float>(
                         "testing.log_float", [](float x) { return log_float(x); }));
  m.def("ordered_bits",
        elementwise<DType::kFloat32, DType::kInt64, float, int64_t>(
            "testing.ordered_bits", [](float x) { return static_cast<int64_t>(ordered_bits(x)); }));
  m.def("e4m3_from_float", elementwise<DType::kFloat32, DType::kUInt8, float, uint8_t>(
                               "testing.e4m3_from_float", [](float x) { return e4m3_from_float(x); }));
  m.def("float_from_e4m3", elementwise<DType::kUInt8, DType::kFloat32, uint8_t, float>(
                               "testing.float_from_e4m3", [](uint8_t c) { return float_from_e4m3(c); }));
  m.def("int8_from_float", elementwise<DType::kFloat32, DType::kInt8, float, int8_t>(
                               "testing.int8_from_float", [](float x) { return int8_from_float(x); }));
  m.def("philox4x32", [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
    const Philox4x32 out = philox4x32({{c0, c1, c2, c3}}, k0, k1);
    return nb::make_tuple(out.word[0], out.word[1], out.word[2], out.word[3]);
  });
  m.def("random_bits", &random_bits, nb::arg("seed"), nb::arg("position"), nb::arg("substream"));
  m.def("draw_target", &draw_target, nb::arg("bits"), nb::arg("total"));
  m.def("top_p_target", &top_p_target, nb::arg("top_p"), nb::arg("total"));
  m.def("describe", &describe,
        "dtype, device, shape, strides and address of an array, as a kernel would see it.");
  m.def(
      "read_tensors",
      [](nb::args arrays) {
        uintptr_t sum = 0;
        for (const nb::handle array : arrays)
          sum += reinterpret_cast<uintptr_t>(tensor_from("testing.read_tensors", "array", array).data);
        return sum;
      },
      "Reads each argument as a tensor and nothing else; bench/overhead.py times it.");
  m.def("read_max", &read_max,
        "Reads an array once, as int32, and returns the maximum; the floor in benchmarks.");
  m.def("parallel_count", [](int num_tasks) {
    std::vector<int> runs(static_cast<size_t>(num_tasks));
    nb::gil_scoped_release release;
    cpu::parallel_for(num_tasks, [&](int task) { ++runs[static_cast<size_t>(task)]; });
    int once = 0;
    for (const int n : runs) once += n == 1;
    return once;
  });
}

}  // namespace tokenstep::bind
