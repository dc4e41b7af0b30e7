#include "cuda/sample_launch.cuh"

template void tokenstep::cuda::launch_sample<float>(const ApplyLogitsParams&, void*, const Stream&);
