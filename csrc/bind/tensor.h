// Tensors in and out of Python, without a framework's ABI.
//
// In: torch hands over a DLTensor through the C functions behind `__dlpack_c_exchange_api__`, found once per
// type: tens of nanoseconds a tensor and no Python object. Whatever else speaks DLPack (NumPy, CuPy, JAX)
// comes in through nb::ndarray. Out: arrays of the same kind as the input; on a GPU torch and CuPy make them.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "common/dtype.h"

namespace tokenstep::bind {

namespace nb = nanobind;

struct ExchangeApi;  // DLPack's C exchange table of one tensor type

constexpr int kMaxDims = 5;
enum class Access { kRead, kWrite };

// A borrowed view of an array argument. It is valid during the call that it was made in.
struct Tensor {
  const char* op = "";  // who asks, for error messages
  const char* argument = "";
  void* data = nullptr;
  DType dtype = DType::kOther;
  int device_type = 1;  // DLPack: 1 CPU, 2 CUDA
  int device_id = 0;
  int ndim = 0;
  std::array<int64_t, kMaxDims> shape{}, stride{};  // strides in elements
  const ExchangeApi* exchange = nullptr;            // null: came in through nb::ndarray
  nb::handle source;
  nb::ndarray<nb::ro> keep_alive;

  bool on_cpu() const { return device_type == 1; }
  bool empty() const { return std::find(shape.begin(), shape.begin() + ndim, 0) != shape.begin() + ndim; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

  // Each check raises TypeError or ValueError that names op, argument, what was expected and what came.
  // Strides of an array without elements mean nothing: libraries fill in what they like, and any are
  // accepted.
  const Tensor& expect_dtype(std::initializer_list<DType> allowed) const;
  const Tensor& expect_ndim(int n) const;
  const Tensor& expect_shape(std::initializer_list<int64_t> expected,
                             const char* names) const;  // -1: any size
  const Tensor& expect_contiguous_last_axis() const;
  const Tensor& expect_contiguous() const;
  const Tensor& expect_same_device(const Tensor& other) const;
};

// Raises TypeError for anything that is not an array, and for torch tensors whose memory does not hold their
// values (requires grad, conjugate or negative views, meta, fake and other subclasses).
Tensor tensor_from(const char* op, const char* argument, nb::handle source, Access access = Access::kRead);

// A new uninitialised contiguous array of the same kind and on the same device as `like`; `view` is set to
// it.
nb::object new_array_like(const Tensor& like, DType dtype, std::initializer_list<int64_t> shape,
                          Tensor& view);

// The stream on which the array's framework is working; null (the default stream) for those that do not say.
void* current_stream(const Tensor& tensor);
// The stream on which torch is working, if this process uses torch; else CuPy's, if it uses CuPy; else null.
void* current_stream(int device_type, int device_id);

std::string kind_of(nb::handle source);  // "None", "a str", "an int": what came instead, for error messages
std::string device_name(int device_type, int device_id);
std::string shape_text(const Tensor& tensor);

}  // namespace tokenstep::bind
