#include "cuda/sample_launch.cuh"

namespace tokenstep::cuda {
template void launch_sample<__half>(const SampleParams&, void*, const Stream&);
template void launch_apply_logits<__half>(const ApplyLogitsParams&, void*, const Stream&);
}  // namespace tokenstep::cuda
