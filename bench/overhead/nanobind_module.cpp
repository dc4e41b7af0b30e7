// sum of the addresses of n tensors: a call that does nothing but read its arguments.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "bind/tensor.h"

namespace nb = nanobind;

NB_MODULE(overhead_nanobind, m) {
  m.def("exchange_api", [](nb::args tensors) {  // the package's own reader, all its checks on
    uintptr_t sum = 0;
    for (const nb::handle t : tensors)
      sum += reinterpret_cast<uintptr_t>(tokenstep::bind::tensor_from("overhead", "t", t).data);
    return sum;
  });
  m.def("ndarray", [](nb::args tensors) {
    uintptr_t sum = 0;
    for (const nb::handle t : tensors) sum += reinterpret_cast<uintptr_t>(nb::cast<nb::ndarray<>>(t).data());
    return sum;
  });
  m.def("checks", [](nb::args tensors) {  // what the reader asks torch, for want of it in the exchange table
    static PyObject* const kRequiresGrad = PyUnicode_InternFromString("requires_grad");
    static PyObject* const kIsNeg = PyUnicode_InternFromString("is_neg");
    uintptr_t refused = 0;
    for (const nb::handle t : tensors) {
      refused += nb::steal(PyObject_GetAttr(t.ptr(), kRequiresGrad)).ptr() != Py_False;
      refused += nb::steal(PyObject_CallMethodObjArgs(t.ptr(), kIsNeg, nullptr)).ptr() != Py_False;
    }
    return refused;
  });
  m.def("nothing", [](nb::args) { return uintptr_t{0}; });
}
