// Linear layer over the kept entries of a weight, stored as a bitmap and the values of its ones, on the GPU.
#pragma once

#include <cstdint>

#include "../cpu/float_type.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace dtm_fast {

// The format is described in dtm_fast/ops/bitmap_weight.py; x and values are of type, bits uint32, begins
// int32 or int64 offsets into values.
//
// x : [M, K], row stride x_stride, M <= kMostBitmapTokens
// y : [M, N], contiguous
//
//   y[m, n] = type(sum over the kept k of x[m, k] * weight[n, k] + bias[n])
//
// Products are exact and sums in float32, in an order that depends on N, K alone.
struct BitmapLinear {
  FloatType type;
  const void* x;
  int64_t x_stride;
  const uint32_t* bits;
  const int64_t* begins;
  const void* values;
  const float* bias;
  int64_t M, N, K;
  void* y;
};

constexpr int64_t kMostBitmapTokens = 16;

// Queued on the stream of the current device; does not wait. Throws std::runtime_error if the launch fails.
void bitmap_linear_cuda(const BitmapLinear& args, CUstream_st* stream);

}  // namespace dtm_fast
