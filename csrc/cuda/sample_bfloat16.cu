#include "cuda/sample_launch.cuh"

template void tokenstep::cuda::launch_sample<__nv_bfloat16>(const ApplyLogitsParams&, void*, const Stream&);
