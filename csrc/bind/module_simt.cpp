// The module tokenstep._C_simt: the CUDA kernels in the emulator, for the tests. No wheel holds it.
#include "bind/simt.h"

NB_MODULE(_C_simt, m) {
  m.doc() = "CUDA kernels of tokenstep, run on the CPU.";
  tokenstep::bind::register_simt_testing(m);
}
