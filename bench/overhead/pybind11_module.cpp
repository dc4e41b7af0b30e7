// The same function with pybind11, which has no tensor type: either the caller passes addresses, or the
// function asks each tensor for a DLPack capsule.
#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

struct DLTensorHead {  // the first field of DLManagedTensor
  void* data;
};

PYBIND11_MODULE(overhead_pybind11, m) {
  m.def("dlpack", [](py::args tensors) {
    uintptr_t sum = 0;
    for (const py::handle t : tensors) {
      const py::object capsule = t.attr("__dlpack__")();
      sum += reinterpret_cast<uintptr_t>(
          static_cast<DLTensorHead*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->data);
    }
    return sum;
  });
  m.def("integers", [](py::args addresses) {
    uintptr_t sum = 0;
    for (const py::handle a : addresses) sum += a.cast<uintptr_t>();
    return sum;
  });
  m.def("nothing", [](py::args) { return uintptr_t{0}; });
}
