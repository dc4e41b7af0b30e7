#include "bind/tensor.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "bind/cupy.h"
#include "common/check.h"

namespace tokenstep::bind {

// ---- the ABI of DLPack 1.3's exchange table (https://dmlc.github.io/dlpack/latest/c_api.html)
// ----------------------
struct ManagedTensor {  // DLManagedTensorVersioned
  uint32_t version_major, version_minor;
  void* manager_context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  nb::dlpack::dltensor tensor;
};

struct ExchangeApi {  // DLPackExchangeAPI
  uint32_t version_major, version_minor;
  ExchangeApi* previous;
  int (*allocate)(nb::dlpack::dltensor* prototype, ManagedTensor** out, void* error_context,
                  void (*set_error)(void*, const char* kind, const char* message));
  int (*managed_from_object)(void* object, ManagedTensor** out);
  int (*managed_to_object)(ManagedTensor* tensor, void** out_object);
  int (*dltensor_from_object)(void* object, nb::dlpack::dltensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out_stream);
};

namespace {

constexpr int kCpu = 1, kCuda = 2;

// What is known of a Python type: found once, then looked up by its address.
struct TypeRecord {
  const ExchangeApi* exchange = nullptr;
  bool is_torch = false;
  bool is_plain_torch = false;  // torch.Tensor or Parameter themselves; subclasses may lie about their memory
  bool is_jax = false;
  bool is_cupy = false;
};

const TypeRecord& record_of_type(nb::handle handle) {
  // The exchange table lives as long as its type, and types are kept alive here: an address is never reused.
  static auto* records = new std::unordered_map<PyObject*, TypeRecord>;
  if (const auto it = records->find(handle.ptr()); it != records->end()) return it->second;

  TypeRecord record;
  nb::object capsule = nb::getattr(handle, "__dlpack_c_exchange_api__", nb::none());
  if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
    const auto* api =
        static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (api && api->version_major != 1) api = api->previous;
    record.exchange = api;
  }
  for (const nb::handle base : nb::borrow<nb::tuple>(handle.attr("__mro__"))) {
    const std::string module = nb::cast<std::string>(nb::str(nb::getattr(base, "__module__", nb::str(""))));
    const std::string name = nb::cast<std::string>(nb::str(nb::getattr(base, "__name__", nb::str(""))));
    const bool is_tensor = (module == "torch" && name == "Tensor");
    record.is_torch |= is_tensor;
    const std::string library = module.substr(0, module.find('.'));
    record.is_jax |= library == "jax" || library == "jaxlib";
    record.is_cupy |= library == "cupy";
    if (base.is(handle))
      record.is_plain_torch = is_tensor || (module == "torch.nn.parameter" && name == "Parameter");
  }
  handle.inc_ref();
  return records->emplace(handle.ptr(), record).first->second;
}

const TypeRecord& record_of(nb::handle source) {
  return record_of_type(reinterpret_cast<PyObject*>(Py_TYPE(source.ptr())));
}

DType dtype_from(nb::dlpack::dtype dtype) {
  using Code = nb::dlpack::dtype_code;
  if (dtype.lanes != 1) return DType::kOther;
  const auto is = [&](Code code, int bits) {
    return dtype.code == static_cast<uint8_t>(code) && dtype.bits == bits;
  };
  if (is(Code::Float, 32)) return DType::kFloat32;
  if (is(Code::Float, 16)) return DType::kFloat16;
  if (is(Code::Bfloat, 16)) return DType::kBFloat16;
  if (is(Code::Float8_E4M3FN, 8)) return DType::kFloat8E4M3;
  if (is(Code::Int, 8)) return DType::kInt8;
  if (is(Code::UInt, 8)) return DType::kUInt8;
  if (is(Code::Int, 32)) return DType::kInt32;
  if (is(Code::Int, 64)) return DType::kInt64;
  if (is(Code::UInt, 32)) return DType::kUInt32;
  if (is(Code::UInt, 64)) return DType::kUInt64;
  if (is(Code::Float, 64)) return DType::kFloat64;
  return DType::kOther;
}

nb::dlpack::dtype dlpack_dtype(DType dtype) {
  using Code = nb::dlpack::dtype_code;
  const auto make = [](Code code, int bits) {
    return nb::dlpack::dtype{static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
  };
  switch (dtype) {
    case DType::kFloat32:
      return make(Code::Float, 32);
    case DType::kFloat16:
      return make(Code::Float, 16);
    case DType::kBFloat16:
      return make(Code::Bfloat, 16);
    case DType::kFloat8E4M3:
      return make(Code::Float8_E4M3FN, 8);
    case DType::kInt8:
      return make(Code::Int, 8);
    case DType::kUInt8:
      return make(Code::UInt, 8);
    case DType::kInt64:
      return make(Code::Int, 64);
    case DType::kUInt32:
      return make(Code::UInt, 32);
    case DType::kUInt64:
      return make(Code::UInt, 64);
    case DType::kFloat64:
      return make(Code::Float, 64);
    default:
      return make(Code::Int, 32);
  }
}

std::string python_type_name(nb::handle source) {
  const nb::object type = nb::borrow(reinterpret_cast<PyObject*>(Py_TYPE(source.ptr())));
  const std::string module = nb::cast<std::string>(nb::str(nb::getattr(type, "__module__", nb::str(""))));
  const std::string name = nb::cast<std::string>(nb::str(nb::getattr(type, "__name__", nb::str("?"))));
  return module == "builtins" || module.empty() ? name : module + "." + name;
}

std::string take_python_error() {  // the pending exception's text; clears it
  try {
    throw nb::python_error();
  } catch (const nb::python_error& error) {
    const std::string text = nb::cast<std::string>(nb::str(error.value()));
    return text.substr(0, text.find('\n'));  // torch appends a C++ stack trace
  }
}

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// The exchange table hands these over without complaint, though their memory does not hold their values, or
// though writing through it would escape autograd.
void refuse_unusable_torch_tensor(const char* op, const char* argument, nb::handle source,
                                  const TypeRecord& record) {
  static PyObject* const kRequiresGrad = interned("requires_grad");
  static PyObject* const kIsNeg = interned("is_neg");
  if (!record.is_plain_torch)
    raise<TypeError>(op,
                     "%s is a %s, expected a plain torch.Tensor: a subclass may keep its values elsewhere",
                     argument, python_type_name(source).c_str());
  const nb::object requires_grad = nb::steal(PyObject_GetAttr(source.ptr(), kRequiresGrad));
  const nb::object is_neg = nb::steal(PyObject_CallMethodObjArgs(source.ptr(), kIsNeg, nullptr));
  if (!requires_grad.is_valid() || !is_neg.is_valid()) throw nb::python_error();
  if (requires_grad.ptr() != Py_False)
    raise<TypeError>(op, "%s requires grad, expected a tensor without it: pass %s.detach()", argument,
                     argument);
  if (is_neg.ptr() != Py_False)
    raise<TypeError>(op, "%s is a negative view, expected its values in memory: pass %s.resolve_neg()",
                     argument, argument);
}

void take_view(Tensor& out, const nb::dlpack::dltensor& view) {
  if (view.ndim > kMaxDims)
    raise<ValueError>(out.op, "%s has %d dimensions, expected at most %d", out.argument, view.ndim, kMaxDims);
  out.data = static_cast<char*>(view.data) + view.byte_offset;
  out.dtype = dtype_from(view.dtype);
  out.device_type = view.device.device_type;
  out.device_id = view.device.device_id;
  out.ndim = view.ndim;
  int64_t packed = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    out.shape[i] = view.shape[i];
    out.stride[i] = view.strides ? view.strides[i] : packed;
    packed *= view.shape[i];
  }
}

}  // namespace

Tensor tensor_from(const char* op, const char* argument, nb::handle source, Access access) {
  Tensor out;
  out.op = op;
  out.argument = argument;
  out.source = source;
  const TypeRecord& record = record_of(source);
  if (record.is_torch) refuse_unusable_torch_tensor(op, argument, source, record);
  if (record.exchange) {
    nb::dlpack::dltensor
        view;  // its shape and strides are the tensor's own: copied before anything else runs
    if (record.exchange->dltensor_from_object(source.ptr(), &view) != 0)
      raise<TypeError>(op, "%s cannot be read: %s", argument, take_python_error().c_str());
    out.exchange = record.exchange;
    take_view(out, view);
    return out;
  }
  // nanobind would also take objects of the plain buffer protocol (bytes, array.array); arrays speak DLPack.
  if (!nb::hasattr(source, "__dlpack__"))
    raise<TypeError>(op, "%s is a %s, expected an array that speaks DLPack (torch, NumPy, CuPy, JAX)",
                     argument, python_type_name(source).c_str());
  if (access == Access::kWrite && record.is_jax)  // its DLPack form does not say so
    raise<ValueError>(op, "%s is a %s, which is immutable, expected an array to write to", argument,
                      python_type_name(source).c_str());
  const nb::object cupy_capsule = record.is_cupy ? cupy::dlpack_of(source) : nb::object();
  if (!nb::try_cast(record.is_cupy ? nb::handle(cupy_capsule) : source, out.keep_alive)) {
    PyErr_Clear();
    nb::object capsule = nb::steal(PyObject_CallMethod(source.ptr(), "__dlpack__", nullptr));
    const std::string reason = capsule.is_valid() ? "its DLPack form is not understood" : take_python_error();
    raise<TypeError>(op, "%s is a %s that cannot be read through DLPack: %s", argument,
                     python_type_name(source).c_str(), reason.c_str());
  }
  if (access == Access::kWrite && !record.is_cupy) {  // whose arrays all are
    nb::ndarray<> writable;
    if (!nb::try_cast(source, writable))
      raise<ValueError>(op, "%s is read-only, expected an array to write to", argument);
  }
  nb::dlpack::dltensor view;
  std::array<int64_t, kMaxDims> shape{}, strides{};
  view.ndim = static_cast<int32_t>(out.keep_alive.ndim());
  for (int i = 0; i < view.ndim && i < kMaxDims; ++i) {
    shape[i] = static_cast<int64_t>(out.keep_alive.shape(i));
    strides[i] = out.keep_alive.stride(i);
  }
  view.data = const_cast<void*>(out.keep_alive.data());
  view.device = {out.keep_alive.device_type(), out.keep_alive.device_id()};
  view.dtype = out.keep_alive.dtype();
  view.shape = shape.data();
  view.strides = strides.data();
  take_view(out, view);
  return out;
}

// ---- checks
// -------------------------------------------------------------------------------------------------------
const Tensor& Tensor::expect_dtype(std::initializer_list<DType> allowed) const {
  std::string names;
  for (const DType want : allowed) {
    if (dtype == want) return *this;
    names += (names.empty() ? "" : " or ") + std::string(name_of(want));
  }
  const std::string got = dtype == DType::kOther
                              ? nb::cast<std::string>(nb::str(nb::getattr(source, "dtype", nb::none())))
                              : std::string(name_of(dtype));
  raise<TypeError>(op, "%s has dtype %s, expected %s", argument, got.c_str(), names.c_str());
}

const Tensor& Tensor::expect_ndim(int n) const {
  if (ndim == n) return *this;
  raise<ValueError>(op, "%s has shape %s, expected %d dimension%s", argument, shape_text(*this).c_str(), n,
                    n == 1 ? "" : "s");
}

const Tensor& Tensor::expect_shape(std::initializer_list<int64_t> expected, const char* names) const {
  bool same = ndim == static_cast<int>(expected.size());
  std::string wanted;
  int i = 0;
  for (const int64_t size : expected) {
    same = same && (size < 0 || shape[i] == size);
    wanted += (i++ ? ", " : "") + (size < 0 ? std::string("any") : std::to_string(size));
  }
  if (same) return *this;
  raise<ValueError>(op, "%s has shape %s, expected [%s] = %s", argument, shape_text(*this).c_str(),
                    wanted.c_str(), names);
}

const Tensor& Tensor::expect_contiguous_last_axis() const {
  if (!empty() && ndim > 0 && shape[ndim - 1] > 1 && stride[ndim - 1] != 1)
    raise<ValueError>(op, "%s has stride %lld along its last axis, expected 1 (a contiguous last axis)",
                      argument, static_cast<long long>(stride[ndim - 1]));
  return *this;
}

const Tensor& Tensor::expect_contiguous() const {
  if (empty()) return *this;
  int64_t packed = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] > 1 && stride[i] != packed)
      raise<ValueError>(op, "%s has stride %lld along axis %d, expected %lld (a contiguous array)", argument,
                        static_cast<long long>(stride[i]), i, static_cast<long long>(packed));
    packed *= shape[i];
  }
  return *this;
}

const Tensor& Tensor::expect_same_device(const Tensor& other) const {
  if (device_type != other.device_type || device_id != other.device_id)
    raise<ValueError>(op, "%s is on %s, expected %s like %s", argument,
                      device_name(device_type, device_id).c_str(),
                      device_name(other.device_type, other.device_id).c_str(), other.argument);
  return *this;
}

// ---- out
// ----------------------------------------------------------------------------------------------------------
nb::object new_array_like(const Tensor& like, DType dtype, std::initializer_list<int64_t> shape,
                          Tensor& view) {
  std::array<int64_t, kMaxDims> sizes{};
  std::copy(shape.begin(), shape.end(), sizes.begin());
  if (like.exchange) {
    nb::dlpack::dltensor prototype;
    prototype.device = {like.device_type, like.device_id};
    prototype.ndim = static_cast<int32_t>(shape.size());
    prototype.dtype = dlpack_dtype(dtype);
    prototype.shape = sizes.data();
    ManagedTensor* managed = nullptr;
    std::string reason;
    const auto set_error = [](void* context, const char* kind, const char* message) {
      *static_cast<std::string*>(context) = std::string(kind) + ": " + message;
    };
    if (like.exchange->allocate(&prototype, &managed, &reason, set_error) != 0)
      throw std::runtime_error(std::string("tokenstep.") + like.op +
                               ": out of memory for an output: " + reason);
    void* object = nullptr;
    if (like.exchange->managed_to_object(managed, &object) != 0) throw nb::python_error();
    nb::object result = nb::steal(static_cast<PyObject*>(object));
    nb::dlpack::dltensor own;
    if (like.exchange->dltensor_from_object(result.ptr(), &own) != 0) throw nb::python_error();
    view = Tensor{};
    view.op = like.op;
    view.argument = "out";
    view.exchange = like.exchange;
    view.source = result;
    take_view(view, own);
    return result;
  }
  if (like.source.is_valid() && record_of(like.source).is_cupy) {
    nb::object result = cupy::empty(shape, name_of(dtype), like.device_id);
    view = tensor_from(like.op, "out", result, Access::kWrite);
    return result;
  }
  if (!like.on_cpu())
    raise<TypeError>(
        like.op, "%s is on %s: its library cannot make arrays there for outputs; pass torch or CuPy arrays",
        like.argument, device_name(like.device_type, like.device_id).c_str());
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  char* memory = new char[static_cast<size_t>(count) * bytes_of(dtype) + 1];
  const nb::capsule owner(memory, [](void* p) noexcept { delete[] static_cast<char*>(p); });
  const std::array<size_t, kMaxDims> unsigned_sizes = [&] {
    std::array<size_t, kMaxDims> u{};
    for (int i = 0; i < kMaxDims; ++i) u[i] = static_cast<size_t>(sizes[i]);
    return u;
  }();
  const nb::ndarray<nb::numpy> array(memory, shape.size(), unsigned_sizes.data(), owner, nullptr,
                                     dlpack_dtype(dtype));
  nb::object result = nb::cast(array);
  view = Tensor{};
  view.op = like.op;
  view.argument = "out";
  nb::dlpack::dltensor own;
  own.data = memory;
  own.device = {kCpu, 0};
  own.ndim = static_cast<int32_t>(shape.size());
  own.dtype = dlpack_dtype(dtype);
  own.shape = sizes.data();
  take_view(view, own);
  view.source = result;
  return result;
}

namespace {

void* stream_of(const ExchangeApi* exchange, int device_type, int device_id) {
  void* stream = nullptr;
  if (exchange && device_type == kCuda && exchange->current_work_stream &&
      exchange->current_work_stream(device_type, device_id, &stream) != 0)
    throw nb::python_error();
  return stream;
}

}  // namespace

void* current_stream(const Tensor& tensor) {
  if (!tensor.exchange && tensor.device_type == kCuda && record_of(tensor.source).is_cupy)
    return cupy::current_stream(tensor.device_id);
  return stream_of(tensor.exchange, tensor.device_type, tensor.device_id);
}

void* current_stream(int device_type, int device_id) {
  if (device_type != kCuda) return nullptr;
  const nb::dict modules = nb::borrow<nb::dict>(PyImport_GetModuleDict());
  if (!modules.contains("torch")) return modules.contains("cupy") ? cupy::current_stream(device_id) : nullptr;
  return stream_of(record_of_type(nb::object(modules["torch"].attr("Tensor"))).exchange, device_type,
                   device_id);
}

std::string kind_of(nb::handle source) {
  if (source.is_none()) return "None";
  const nb::handle type(reinterpret_cast<PyObject*>(Py_TYPE(source.ptr())));
  const std::string name = nb::cast<std::string>(nb::str(type.attr("__name__")));
  return (strchr("aeiou", name[0]) ? "an " : "a ") + name;
}

std::string device_name(int device_type, int device_id) {
  switch (device_type) {
    case kCpu:
      return "cpu";
    case kCuda:
      return "cuda:" + std::to_string(device_id);
    default:
      return "device type " + std::to_string(device_type);
  }
}

std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int i = 0; i < tensor.ndim; ++i) text += (i ? ", " : "") + std::to_string(tensor.shape[i]);
  return text + "]";
}

}  // namespace tokenstep::bind
