// The module tokenstep._C_simt: the CUDA kernels in the emulator, for the tests. No wheel holds it.
#include "bind/ops.h"
#include "bind/simt.h"

NB_MODULE(_C_simt, m) {
  m.doc() = "CUDA kernels of tokenstep, run on the CPU.";
  tokenstep::bind::translate_errors();
  tokenstep::bind::register_sample(m);
  tokenstep::bind::register_attention(m);
  tokenstep::bind::register_simt_testing(m);
  tokenstep::bind::register_device_testing(m);
}
