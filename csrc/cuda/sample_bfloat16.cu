#include "cuda/sample_launch.cuh"

namespace tokenstep::cuda {
template void launch_sample<__nv_bfloat16>(const SampleParams&, void*, const Stream&);
template void launch_apply_logits<__nv_bfloat16>(const ApplyLogitsParams&, void*, const Stream&);
}  // namespace tokenstep::cuda
