// Linear layer with int8 weights and activations quantized on the fly, on the GPU.
#pragma once

#include <cstdint>

#include "../cpu/float_type.h"
#include "kernel_choice.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace dtm_fast {

// x        : [M, K] of type, row stride x_stride
// qweight  : [N, K] int8, row stride qweight_stride; -128 is allowed; K < 2^17
// scale    : [N] float32
// bias     : [N] float32, or nullptr
// y        : [M, N] of type, contiguous
// qx       : [M, qx_stride] int8, working memory; qx_stride = K rounded up to a multiple of 16, 16-byte
// aligned scale_x  : [M] float32, working memory
//
//   qx, scale_x = quantize_int8(x)
//   y[m, n]     = type(float32(sum_k qx[m, k] * qweight[n, k]) * (scale_x[m] * scale[n]) + bias[n])
//
// every step rounded to float32, none fused: the bits are those of the CPU kernels and of the reference twin.
struct Int8Linear {
  FloatType type;
  const void* x;
  int64_t x_stride;
  const int8_t* qweight;
  int64_t qweight_stride;
  const float* scale;
  const float* bias;
  int64_t M, N, K;
  void* y;
  int8_t* qx;
  int64_t qx_stride;
  float* scale_x;
};

// Whether a kernel can take these arguments on the current device; kBest always can.
bool int8_linear_possible(CudaKernel kernel, const Int8Linear& args);

// Queued on the stream of the current device; does not wait. Throws std::runtime_error if a launch fails, or
// the kernel cannot take the arguments.
void int8_linear_cuda(CudaKernel kernel, const Int8Linear& args, CUstream_st* stream);

// The products, after quantization: one file each. They are launched as programmatic dependents of the
// quantization, so they read of qx and scale_x only after griddepcontrol.wait. int8_few_stream does without
// where int8_few_stream_quantizes.
bool int8_few_tokens_possible(const Int8Linear& args);
bool int8_few_stream_possible(const Int8Linear& args);
bool int8_few_stream_quantizes(const Int8Linear& args);
bool int8_hopper_possible(const Int8Linear& args);
void int8_few_tokens(const Int8Linear& args, CUstream_st* stream);
void int8_few_stream(const Int8Linear& args, CUstream_st* stream);
void int8_mma(const Int8Linear& args, CUstream_st* stream);
void int8_hopper(const Int8Linear& args, CUstream_st* stream);

}  // namespace dtm_fast
