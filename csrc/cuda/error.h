// CUDA's errors as exceptions.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace tokenstep::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it has been reported
  throw std::runtime_error(std::string("tokenstep: CUDA: ") + what + ": " + cudaGetErrorString(error));
}

}  // namespace tokenstep::cuda
