// PackedMatrix of the CPU module: weights packed for linear, and products with them.
#include "cpu/linear.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "bind/ops.h"
#include "bind/tensor.h"
#include "common/check.h"
#include "cpu/packed_matrix.h"

namespace tokenstep::bind {
namespace {

using cpu::PackedMatrix;
using cpu::WeightFormat;

constexpr int64_t kMaxSize = int64_t{1} << 31;  // rows and columns

WeightFormat read_format(const std::string& name) {
  for (const WeightFormat format :
       {WeightFormat::kBFloat16, WeightFormat::kQ4_0, WeightFormat::kQ4_1, WeightFormat::kQ8_0})
    if (name == cpu::name_of(format)) return format;
  raise<ValueError>("PackedMatrix", "format = '%s', expected bfloat16, q4_0, q4_1 or q8_0", name.c_str());
}

void expect_size(int64_t rows, int64_t columns) {
  if (rows < 1 || rows > kMaxSize)
    raise<ValueError>("PackedMatrix", "rows = %lld, expected 1 \u2264 rows \u2264 %lld",
                      static_cast<long long>(rows), static_cast<long long>(kMaxSize));
  if (columns < 1 || columns > kMaxSize || columns % cpu::kBlockColumns)
    raise<ValueError>("PackedMatrix", "columns = %lld, expected a multiple of %d from %d to %lld",
                      static_cast<long long>(columns), cpu::kBlockColumns, cpu::kBlockColumns,
                      static_cast<long long>(kMaxSize));
}

int64_t num_bytes_of(const std::string& format, int64_t rows, int64_t columns) {
  expect_size(rows, columns);
  return cpu::packed_bytes(read_format(format), rows, columns);
}

const Tensor& expect_host(const Tensor& tensor) {
  if (!tensor.on_cpu())
    raise<ValueError>(tensor.op, "%s is on %s, expected cpu", tensor.argument,
                      device_name(tensor.device_type, tensor.device_id).c_str());
  return tensor;
}

// A matrix, and what keeps its memory.
struct Matrix {
  PackedMatrix packed;
  nb::object memory;
};

Matrix make(const std::string& format, int64_t rows, int64_t columns, nb::handle memory) {
  constexpr const char* kOp = "PackedMatrix";
  const Tensor bytes = tensor_from(kOp, "memory", memory, Access::kWrite);
  expect_host(bytes)
      .expect_dtype({DType::kUInt8})
      .expect_shape({num_bytes_of(format, rows, columns)}, "[num_bytes_of(format, rows, columns)]")
      .expect_contiguous();
  if (reinterpret_cast<uintptr_t>(bytes.data) % PackedMatrix::kAlignment)
    raise<ValueError>(kOp, "memory begins at an address that is no multiple of %d", PackedMatrix::kAlignment);
  return {PackedMatrix(read_format(format), rows, columns, bytes.as<uint8_t>()), nb::borrow(memory)};
}

void pack(Matrix& self, nb::handle source, int64_t first_row) {
  PackedMatrix& matrix = self.packed;
  constexpr const char* kOp = "PackedMatrix.pack";
  const Tensor raw = tensor_from(kOp, "source", source);
  expect_host(raw)
      .expect_dtype({DType::kUInt8})
      .expect_shape({-1, matrix.row_bytes()}, "[rows, bytes of a row]")
      .expect_contiguous();
  if (first_row < 0 || first_row + raw.shape[0] > matrix.rows())
    raise<ValueError>(kOp, "first_row = %lld, expected %lld rows within the %lld of the matrix",
                      static_cast<long long>(first_row), static_cast<long long>(raw.shape[0]),
                      static_cast<long long>(matrix.rows()));
  nb::gil_scoped_release release;
  matrix.pack(raw.as<uint8_t>(), first_row, raw.shape[0]);
}

void gather(const Matrix& self, nb::handle rows, nb::handle out) {
  const PackedMatrix& matrix = self.packed;
  constexpr const char* kOp = "PackedMatrix.gather";
  const Tensor ids = tensor_from(kOp, "rows", rows), y = tensor_from(kOp, "out", out, Access::kWrite);
  expect_host(ids).expect_dtype({DType::kInt64}).expect_ndim(1).expect_contiguous();
  expect_host(y)
      .expect_dtype({DType::kFloat32, DType::kFloat16, DType::kBFloat16})
      .expect_shape({ids.shape[0], matrix.columns()}, "[len(rows), columns]")
      .expect_contiguous();
  for (int64_t i = 0; i < ids.shape[0]; ++i)
    if (const int64_t row = ids.as<const int64_t>()[i]; row < 0 || row >= matrix.rows())
      raise<ValueError>(kOp, "rows[%lld] = %lld, expected 0 \u2264 row < %lld", static_cast<long long>(i),
                        static_cast<long long>(row), static_cast<long long>(matrix.rows()));
  nb::gil_scoped_release release;
  cpu::gather_rows(matrix, ids.as<const int64_t>(), ids.shape[0], y.dtype, y.data);
}

void linear(const Matrix& self, nb::handle x_source, nb::handle out, nb::handle bias, nb::handle residual) {
  const PackedMatrix& matrix = self.packed;
  constexpr const char* kOp = "PackedMatrix.linear";
  const Tensor x = tensor_from(kOp, "x", x_source), y = tensor_from(kOp, "out", out, Access::kWrite);
  expect_host(x)
      .expect_dtype({DType::kFloat32, DType::kFloat16, DType::kBFloat16})
      .expect_shape({-1, matrix.columns()}, "[rows, columns of the weights]")
      .expect_contiguous_last_axis();
  expect_host(y)
      .expect_dtype({x.dtype})
      .expect_shape({x.shape[0], matrix.rows()}, "[rows of x, rows of the weights]")
      .expect_contiguous();
  cpu::LinearParams params{};
  params.weights = &matrix;
  params.dtype = x.dtype;
  params.num_rows = x.shape[0];
  params.x = x.data;
  params.x_stride = x.stride[0];
  params.out = y.data;
  if (!bias.is_none()) {
    const Tensor b = tensor_from(kOp, "bias", bias);
    expect_host(b)
        .expect_dtype({x.dtype})
        .expect_shape({matrix.rows()}, "[rows of the weights]")
        .expect_contiguous();
    params.bias = b.data;
  }
  if (!residual.is_none()) {
    const Tensor r = tensor_from(kOp, "residual", residual);
    expect_host(r)
        .expect_dtype({x.dtype})
        .expect_shape({x.shape[0], matrix.rows()}, "[rows of x, rows of the weights]")
        .expect_contiguous_last_axis();
    params.residual = r.data;
    params.residual_stride = r.stride[0];
  }
  nb::gil_scoped_release release;
  cpu::linear(params);
}

}  // namespace

void register_linear(nb::module_& m) {
  nb::class_<Matrix>(m, "PackedMatrix", "A weight matrix, packed in tiles for products on the CPU.")
      .def(
          "__init__",
          [](Matrix* self, const std::string& format, int64_t rows, int64_t columns, nb::handle memory) {
            new (self) Matrix(make(format, rows, columns, memory));
          },
          nb::arg("format"), nb::arg("rows"), nb::arg("columns"), any_object("memory"),
          "format: bfloat16, q4_0, q4_1 or q8_0; memory: uint8 [num_bytes_of(...)] from a multiple of 64 on.")
      .def_static("num_bytes_of", &num_bytes_of, nb::arg("format"), nb::arg("rows"), nb::arg("columns"))
      .def("pack", &pack, any_object("source"), nb::arg("first_row") = 0,
           "Fills rows from first_row on: source uint8 [rows, row_bytes], bfloat16 values or GGUF's blocks. "
           "Several threads may pack different rows at once.")
      .def("gather", &gather, any_object("rows"), any_object("out"),
           "out[i] = the numbers of row rows[i], int64, in the type of out.")
      .def("linear", &linear, any_object("x"), any_object("out"), any_object("bias") = nb::none(),
           any_object("residual") = nb::none(),
           "out = x W^T + bias + residual, summed in float32 and rounded once. A row's bits don't depend on "
           "other rows.")
      .def_prop_ro("format", [](const Matrix& self) { return cpu::name_of(self.packed.format()); })
      .def_prop_ro("rows", [](const Matrix& self) { return self.packed.rows(); })
      .def_prop_ro("columns", [](const Matrix& self) { return self.packed.columns(); })
      .def_prop_ro("row_bytes", [](const Matrix& self) { return self.packed.row_bytes(); });
}

}  // namespace tokenstep::bind
