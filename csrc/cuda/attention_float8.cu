#include "cuda/attention_launch.cuh"

namespace tokenstep::cuda {

template <>
void launch_attention<float, Float8>(AttentionKernelParams& params, const Stream& stream) {
  launch_attention_in<float, Float8, 64, 128, 256>(params, stream);
}

template <>
void launch_attention<__half, Float8>(AttentionKernelParams& params, const Stream& stream) {
  launch_attention_in<__half, Float8, 64, 128, 256>(params, stream);
}

template <>
void launch_attention<__nv_bfloat16, Float8>(AttentionKernelParams& params, const Stream& stream) {
  launch_attention_in<__nv_bfloat16, Float8, 64, 128, 256>(params, stream);
}

}  // namespace tokenstep::cuda
