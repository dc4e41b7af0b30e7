#include "cuda/sample_launch.cuh"

namespace tokenstep::cuda {
template void launch_sample<float>(const SampleParams&, void*, const Stream&);
template void launch_apply_logits<float>(const ApplyLogitsParams&, void*, const Stream&);
}  // namespace tokenstep::cuda
