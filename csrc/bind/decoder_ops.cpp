// rms_norm, gate and soft_cap of the CPU module: the decoder's own, on torch's tensors or NumPy's arrays.
#include "cpu/decoder_ops.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <climits>
#include <string>

#include "bind/ops.h"
#include "bind/tensor.h"
#include "common/check.h"

namespace tokenstep::bind {
namespace {

const Tensor& expect_floats_here(const Tensor& tensor) {
  if (!tensor.on_cpu())
    raise<ValueError>(tensor.op, "%s is on %s, expected cpu", tensor.argument,
                      device_name(tensor.device_type, tensor.device_id).c_str());
  return tensor.expect_dtype({DType::kFloat32, DType::kFloat16, DType::kBFloat16});
}

// The caller's array, or a new one.
nb::object provide_out(const Tensor& like, nb::handle source, std::initializer_list<int64_t> shape,
                       Tensor& out) {
  if (source.is_none()) return new_array_like(like, like.dtype, shape, out);
  out = tensor_from(like.op, "out", source, Access::kWrite);
  expect_floats_here(out).expect_dtype({like.dtype}).expect_shape(shape, "the result").expect_contiguous();
  return nb::borrow(source);
}

int32_t size_of_axis(const Tensor& tensor, int axis) {
  const int64_t size = tensor.shape[axis];
  if (size > INT32_MAX / 2)
    raise<ValueError>(tensor.op, "%s has %lld elements along axis %d, expected fewer than 2^30",
                      tensor.argument, static_cast<long long>(size), axis);
  return static_cast<int32_t>(size);
}

nb::object rms_norm(nb::handle x_source, nb::handle weight_source, float eps, nb::handle out_source) {
  constexpr const char* kOp = "rms_norm";
  const Tensor x = tensor_from(kOp, "x", x_source), weight = tensor_from(kOp, "weight", weight_source);
  expect_floats_here(x).expect_contiguous_last_axis();
  if (x.ndim != 2 && x.ndim != 3)
    raise<ValueError>(kOp, "x has shape %s, expected [T, size] or [T, heads, size]", shape_text(x).c_str());
  const bool has_heads = x.ndim == 3;
  expect_floats_here(weight).expect_dtype({DType::kFloat32, x.dtype}).expect_contiguous();
  if (has_heads)
    weight.expect_shape({x.shape[1], x.shape[2]}, "[heads, size] of x");
  else
    weight.expect_shape({x.shape[1]}, "[size] of x");
  Tensor out;
  const nb::object result = has_heads ? provide_out(x, out_source, {x.shape[0], x.shape[1], x.shape[2]}, out)
                                      : provide_out(x, out_source, {x.shape[0], x.shape[1]}, out);
  const cpu::RmsNormParams params{.dtype = x.dtype,
                                  .weight_dtype = weight.dtype,
                                  .num_rows = x.shape[0],
                                  .num_heads = has_heads ? size_of_axis(x, 1) : 1,
                                  .size = size_of_axis(x, x.ndim - 1),
                                  .x = x.data,
                                  .x_row_stride = x.stride[0],
                                  .x_head_stride = has_heads ? x.stride[1] : 0,
                                  .weight = weight.data,
                                  .eps = eps,
                                  .out = out.data};
  if (x.empty()) return result;
  nb::gil_scoped_release release;
  cpu::rms_norm(params);
  return result;
}

cpu::Activation read_activation(const std::string& name) {
  if (name == "silu") return cpu::Activation::kSilu;
  if (name == "gelu_tanh") return cpu::Activation::kGeluTanh;
  raise<ValueError>("gate", "activation = '%s', expected silu or gelu_tanh", name.c_str());
}

nb::object gate(nb::handle gate_up_source, const std::string& activation, nb::handle out_source) {
  constexpr const char* kOp = "gate";
  const Tensor gate_up = tensor_from(kOp, "gate_up", gate_up_source);
  expect_floats_here(gate_up).expect_ndim(2).expect_contiguous_last_axis();
  if (gate_up.shape[1] % 2)
    raise<ValueError>(kOp, "gate_up has shape %s, expected [T, 2 * size]", shape_text(gate_up).c_str());
  Tensor out;
  const nb::object result = provide_out(gate_up, out_source, {gate_up.shape[0], gate_up.shape[1] / 2}, out);
  const cpu::GateParams params{.dtype = gate_up.dtype,
                               .activation = read_activation(activation),
                               .num_rows = gate_up.shape[0],
                               .size = size_of_axis(gate_up, 1) / 2,
                               .gate_up = gate_up.data,
                               .row_stride = gate_up.stride[0],
                               .out = out.data};
  if (gate_up.empty()) return result;
  nb::gil_scoped_release release;
  cpu::gate(params);
  return result;
}

void soft_cap(nb::handle x_source, float cap) {
  constexpr const char* kOp = "soft_cap";
  const Tensor x = tensor_from(kOp, "x", x_source, Access::kWrite);
  expect_floats_here(x).expect_ndim(2).expect_contiguous_last_axis();
  if (!(cap > 0.0f)) raise<ValueError>(kOp, "cap = %g, expected cap > 0", static_cast<double>(cap));
  const cpu::SoftCapParams params{.dtype = x.dtype,
                                  .cap = cap,
                                  .num_rows = x.shape[0],
                                  .size = size_of_axis(x, 1),
                                  .x = x.data,
                                  .row_stride = x.stride[0]};
  if (x.empty()) return;
  nb::gil_scoped_release release;
  cpu::soft_cap(params);
}

}  // namespace

void register_decoder_ops(nb::module_& m) {
  m.def("rms_norm", &rms_norm, any_object("x"), any_object("weight"), nb::arg("eps"),
        any_object("out") = nb::none(),
        "x / sqrt(mean(x^2) + eps) * weight over the last axis of x [T, size] or [T, heads, size]; weight "
        "[size] or [heads, size], float32 or in the dtype of x. Computed in float32, rounded once; into out, "
        "if given.");
  m.def("gate", &gate, any_object("gate_up"), nb::arg("activation"), any_object("out") = nb::none(),
        "activation(gate) * up, from [T, 2 * size], gate first, to [T, size]. Computed in float32, rounded "
        "once; into out, if given. activation: silu or gelu_tanh.");
  m.def("soft_cap", &soft_cap, any_object("x"), nb::arg("cap"),
        "x = cap * tanh(x / cap), [T, size], in place.");
}

}  // namespace tokenstep::bind
