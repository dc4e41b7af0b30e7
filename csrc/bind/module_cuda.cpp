// The module tokenstep._C_cuda: the ops on CUDA tensors. It links cudart statically and imports without a
// driver.
#include "bind/ops.h"
#include "common/numerics.h"
#include "cuda/runtime.h"

namespace nb = nanobind;

NB_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of tokenstep. Use the functions of the tokenstep package.";
  tokenstep::bind::translate_errors();
  m.attr("numerics_version") = tokenstep::kNumericsVersion;
  m.attr("architectures") = TOKENSTEP_CUDA_ARCHITECTURES;
  m.def("unusable_because", &tokenstep::cuda::unusable_because,
        "Why no GPU can be used here, in the words of the CUDA runtime; None if one can.");
  m.def("num_devices", &tokenstep::cuda::num_devices);
  m.def("current_device", &tokenstep::cuda::current_device);
  tokenstep::bind::register_sample(m);
  tokenstep::bind::register_attention(m);
  tokenstep::bind::register_device_testing(m);
}
