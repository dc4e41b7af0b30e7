#include "cuda/attention_launch.cuh"

namespace tokenstep::cuda {

template <>
void launch_attention<float, Int8>(AttentionKernelParams& params, const Stream& stream) {
  launch_attention_in<float, Int8, 64, 128, 256>(params, stream);
}

template <>
void launch_attention<__half, Int8>(AttentionKernelParams& params, const Stream& stream) {
  launch_attention_in<__half, Int8, 64, 128, 256>(params, stream);
}

template <>
void launch_attention<__nv_bfloat16, Int8>(AttentionKernelParams& params, const Stream& stream) {
  launch_attention_in<__nv_bfloat16, Int8, 64, 128, 256>(params, stream);
}

}  // namespace tokenstep::cuda
