// The module tokenstep._C: the ops on CPU tensors, and what the process runs on.
#include <nanobind/nanobind.h>

#include "bind/ops.h"
#include "common/numerics.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace nb = nanobind;

NB_MODULE(_C, m) {
  m.doc() = "CPU kernels of tokenstep. Use the functions of the tokenstep package.";
  tokenstep::bind::translate_errors();

  m.attr("numerics_version") = tokenstep::kNumericsVersion;
  m.attr("cuda_state") = TOKENSTEP_CUDA_STATE;
  m.def(
      "isa", [] { return tokenstep::cpu::name_of(tokenstep::cpu::active_isa()); },
      "Name of the instruction set in use.");
  m.def("set_isa", &tokenstep::cpu::set_isa, nb::arg("name"),
        "Use another instruction set ('' chooses again); for tests and measurements.");
  m.def("num_threads", &tokenstep::cpu::num_threads, "Threads that one op may use.");
  m.def("set_num_threads", &tokenstep::cpu::set_num_threads, nb::arg("n"));
  m.def("thread_backend", &tokenstep::cpu::thread_backend, "'openmp' or 'pool'.");
  m.def("set_thread_backend", &tokenstep::cpu::set_thread_backend, nb::arg("name"));
  tokenstep::bind::register_sample(m);
  tokenstep::bind::register_attention(m);
  tokenstep::bind::register_linear(m);
  tokenstep::bind::register_decoder_ops(m);
  tokenstep::bind::register_testing(m);
}
