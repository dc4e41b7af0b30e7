#include "cuda/attention_launch.cuh"

template <>
void tokenstep::cuda::launch_attention<__half, __half>(AttentionKernelParams& params, const Stream& stream) {
  launch_attention_in<__half, __half, 64, 80, 96, 112, 128, 192, 256>(params, stream);
}
