// The kernels that an operation may have, by what they are made for.
#pragma once

namespace dtm_fast {

enum class CudaKernel : int {
  kBest = 0,             // the launcher chooses
  kFewTokens = 1,        // at most 16 rows of x: streams the weight once, limited by memory
  kMma = 2,              // mma.sync, on every GPU since Ampere; takes any stride, alignment and tail
  kHopper = 3,           // wgmma and TMA, compute capability 9.0; needs aligned rows
  kFewTokensStream = 4,  // as kFewTokens, the weight through a ring in shared memory; compute capability 9.0
};

constexpr int kCudaKernels = 5;

}  // namespace dtm_fast
