#include "bind/cupy.h"

#include <memory>

namespace tokenstep::bind::cupy {

namespace {

nb::object function(const char* module, const char* name) { return nb::module_::import_(module).attr(name); }

}  // namespace

void* current_stream(int device_id) {
  const nb::object stream = function("cupy.cuda", "get_current_stream")(device_id);
  return reinterpret_cast<void*>(nb::cast<uintptr_t>(stream.attr("ptr")));
}

// Told the stream of the launch, CuPy has nothing to wait for; told none, it would make the default stream
// wait, which a stream that is being captured must not do. The protocol calls the default stream 1.
nb::object dlpack_of(nb::handle array) {
  const int device_id = nb::cast<int>(array.attr("__dlpack_device__")()[1]);
  const auto stream = reinterpret_cast<uintptr_t>(current_stream(device_id));
  return array.attr("__dlpack__")(nb::arg("stream") = stream == 0 ? 1 : stream);
}

nb::object empty(std::initializer_list<int64_t> shape, const char* dtype, int device_id) {
  nb::list sizes;
  for (const int64_t size : shape) sizes.append(size);
  const nb::object device = function("cupy.cuda", "Device")(device_id);
  device.attr("__enter__")();
  const auto leave = [](PyObject* d) {  // runs while an exception may be under way: it must throw none
    const nb::object left = nb::steal(PyObject_CallMethod(d, "__exit__", "OOO", Py_None, Py_None, Py_None));
    if (!left.is_valid()) PyErr_WriteUnraisable(d);
  };
  const std::unique_ptr<PyObject, decltype(leave)> entered(device.ptr(), leave);
  return function("cupy", "empty")(nb::tuple(sizes), nb::arg("dtype") = dtype);
}

}  // namespace tokenstep::bind::cupy
