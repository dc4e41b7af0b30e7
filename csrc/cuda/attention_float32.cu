#include "cuda/attention_launch.cuh"

template <>
void tokenstep::cuda::launch_attention<float, float>(AttentionKernelParams& params, const Stream& stream) {
  launch_attention_in<float, float, 64, 128, 256>(params, stream);
}
