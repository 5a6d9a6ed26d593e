#include <algorithm>
#include <stdexcept>
#include <string>

#include "unpack_mask.h"

namespace dtm_fast {
namespace {

// One thread per entry: the writes of a warp are contiguous, its reads hit 4 bytes or two cache lines.
__global__ void unpack_mask_kernel(const uint8_t* packed, int64_t N, int64_t K, uint8_t* mask) {
  const int64_t row_bytes = (K + 7) / 8;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < N * K; i += step) {
    const int64_t n = i / K;
    const int64_t k = i - n * K;
    mask[i] = (packed[n * row_bytes + k / 8] >> (k % 8)) & 1;
  }
}

}  // namespace

void unpack_mask_cuda(const uint8_t* packed, int64_t N, int64_t K, uint8_t* mask, CUstream_st* stream) {
  if (N * K == 0) return;
  constexpr int64_t kThreads = 256;
  constexpr int64_t kMaxBlocks = 1 << 20;  // more entries than that: every thread takes several
  const int64_t blocks = std::min(kMaxBlocks, (N * K + kThreads - 1) / kThreads);
  unpack_mask_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(packed, N, K, mask);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("unpack_mask: ") + cudaGetErrorString(error));
}

}  // namespace dtm_fast
