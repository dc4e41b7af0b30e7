#include "cuda/sample_launch.cuh"

template void tokenstep::cuda::launch_sample<__half>(const ApplyLogitsParams&, void*, const Stream&);
