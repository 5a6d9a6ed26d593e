// What every launcher needs of the CUDA runtime. Launchers queue on a stream of the current device and wait
// for nothing.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace dtm_fast {

// Throws std::runtime_error, naming the operation, if the call or the last launch failed.
inline void check_cuda(cudaError_t error, const char* operation) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(operation) + ": " + cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// 80 for 8.0, 90 for 9.0.
inline int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

}  // namespace dtm_fast
