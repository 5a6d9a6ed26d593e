// Linear layer with a bitmask over its weight, several masks of one weight in one pass, on the GPU.
#pragma once

#include <cstdint>

#include "../cpu/float_type.h"
#include "kernel_choice.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace dtm_fast {

// x      : [M, K] of type, row stride x_stride
// weight : [N, K] of type, row stride weight_stride
// mask   : [V, N, ceil(K / 8)] bits, lowest first, 0 beyond K; strides in bytes
// bias   : [N] float32, or nullptr
// y      : [V, M, N] of type, contiguous
//
//   y[v, m, n] = type(sum_k x[m, k] * (bit k of mask[v, n] ? weight[n, k] : 0) + bias[n])
//
// Products are exact and sums in float32, in an order that each kernel fixes: it depends neither on the other
// rows of x, nor on M within the range of that kernel, nor on V. A masked weight does not count, even if it
// is NaN.
struct MaskedLinear {
  FloatType type;
  const void* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride;
  const uint8_t* mask;
  int64_t mask_row_stride, mask_variant_stride;
  const float* bias;
  int64_t V, M, N, K;
  void* y;
};

// Whether a kernel can take these arguments on the current device; kBest and kMma always can.
bool masked_linear_possible(CudaKernel kernel, const MaskedLinear& args);

// Queued on the stream of the current device; does not wait. Throws std::runtime_error if a launch fails, or
// the kernel cannot take the arguments.
void masked_linear_cuda(CudaKernel kernel, const MaskedLinear& args, CUstream_st* stream);

// One file each. kMma is two: mma.sync for bfloat16, fused multiply-adds for float32.
bool masked_few_tokens_possible(const MaskedLinear& args);
bool masked_few_stream_possible(const MaskedLinear& args);
bool masked_hopper_possible(const MaskedLinear& args);
void masked_few_tokens(const MaskedLinear& args, CUstream_st* stream);
void masked_few_stream(const MaskedLinear& args, CUstream_st* stream);
void masked_mma(const MaskedLinear& args, CUstream_st* stream);
void masked_float32(const MaskedLinear& args, CUstream_st* stream);
void masked_hopper(const MaskedLinear& args, CUstream_st* stream);

}  // namespace dtm_fast
