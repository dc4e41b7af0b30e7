// Python arguments as numbers: one for all rows or one per row, from numbers, lists and arrays. Errors name
// the op, the argument, the row and the entry.
#pragma once
#include <string>
#include <type_traits>

#include "bind/tensor.h"
#include "common/check.h"

namespace tokenstep::bind {

using Int128 = __int128;  // holds every int64 and uint64

std::string text_of(double value);
std::string text_of(Int128 value);

// An argument, or an entry of it: `top_p`, `top_p[3]`, `prompt_tokens[3][17]`.
struct Label {
  const char* op;
  const char* name;
  int64_t row = -1, entry = -1;
  bool entry_only = false;  // the argument is one row's: `prompt_tokens[17]`

  std::string text() const;
  Label at(int64_t i) const { return {op, name, row, i, entry_only}; }
  template <class Value>
  [[noreturn]] void reject(Value value, const char* expected) const {
    raise<ValueError>(op, "%s = %s, expected %s", text().c_str(), text_of(value).c_str(), expected);
  }
  [[noreturn]] void reject_type(nb::handle got, const char* expected) const;
};

void read_number(const Label& label, nb::handle source, double& out);
void read_number(const Label& label, nb::handle source, Int128& out);

bool is_array(nb::handle source);
void expect_length(const Label& label, int64_t length, int64_t expected);
void expect_host(const Label& label, const Tensor& array);  // the array's values can be read here

template <class Value>
const Tensor& expect_dtype_of(const Tensor& array) {
  if constexpr (std::is_same_v<Value, double>)
    return array.expect_dtype({DType::kFloat32, DType::kFloat64, DType::kInt32, DType::kInt64});
  else
    return array.expect_dtype({DType::kInt32, DType::kInt64, DType::kUInt32, DType::kUInt64});
}

template <class Value>
Value element(const Tensor& array, int64_t i) {
  const int64_t at = i * array.stride[0];
  switch (array.dtype) {
    case DType::kFloat32:
      return static_cast<Value>(array.as<const float>()[at]);
    case DType::kFloat64:
      return static_cast<Value>(array.as<const double>()[at]);
    case DType::kInt32:
      return static_cast<Value>(array.as<const int32_t>()[at]);
    case DType::kUInt32:
      return static_cast<Value>(array.as<const uint32_t>()[at]);
    case DType::kUInt64:
      return static_cast<Value>(array.as<const uint64_t>()[at]);
    default:
      return static_cast<Value>(array.as<const int64_t>()[at]);
  }
}

// Calls set(row, value, label) for each row of the batch; take_array(array) is asked first whether it takes
// an array as it is.
template <class Value, class TakeArray, class Set>
void read_values(const Label& argument, nb::handle source, int num_rows, TakeArray take_array, Set set) {
  const auto set_all = [&](nb::handle number) {
    Value value;
    read_number(argument, number, value);
    if (num_rows == 0) set(-1, value, argument);  // checks the value
    for (int row = 0; row < num_rows; ++row) set(row, value, argument);
  };
  if (PyFloat_Check(source.ptr()) || PyLong_Check(source.ptr())) return set_all(source);
  if (const bool is_list = PyList_Check(source.ptr()); is_list || PyTuple_Check(source.ptr())) {
    expect_length(argument, PySequence_Size(source.ptr()), num_rows);
    for (int row = 0; row < num_rows; ++row) {
      const Label label{argument.op, argument.name, row};
      // Converting an element runs Python code, which may shorten the list.
      PyObject* item = is_list ? PyList_GetItem(source.ptr(), row) : PyTuple_GetItem(source.ptr(), row);
      if (!item) throw nb::python_error();
      const nb::object number = nb::borrow(item);
      Value value;
      read_number(label, number, value);
      set(row, value, label);
    }
    return;
  }
  if (!is_array(source)) {
    if (!PyNumber_Check(source.ptr()))
      argument.reject_type(source, "a number, or a list or array of one per row");
    return set_all(source);
  }
  const Tensor array = tensor_from(argument.op, argument.name, source);
  expect_dtype_of<Value>(array);
  if (array.ndim != 0) {
    array.expect_ndim(1);
    expect_length(argument, array.shape[0], num_rows);
  }
  if (take_array(array)) return;
  expect_host(argument, array);
  if (array.ndim == 0) return set_all(source);
  for (int row = 0; row < num_rows; ++row)
    set(row, element<Value>(array, row), Label{argument.op, argument.name, row});
}

}  // namespace tokenstep::bind
