#include "cuda/attention_launch.cuh"

template <>
void tokenstep::cuda::launch_attention<__nv_bfloat16, __nv_bfloat16>(AttentionKernelParams& params,
                                                                     const Stream& stream) {
  launch_attention_in<__nv_bfloat16, __nv_bfloat16, 64, 80, 96, 112, 128, 192, 256>(params, stream);
}
