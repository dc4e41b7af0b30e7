// What registers itself in tokenstep._C_simt: the CUDA kernels, run on the CPU by csrc/simt for the tests.
#pragma once
#include <nanobind/nanobind.h>

namespace tokenstep::bind {

void register_simt_testing(nanobind::module_& parent);  // tests/simt
void register_simt_faults(nanobind::module_& m);

}  // namespace tokenstep::bind
