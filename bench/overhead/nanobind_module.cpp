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
  m.def("nothing", [](nb::args) { return uintptr_t{0}; });
}
