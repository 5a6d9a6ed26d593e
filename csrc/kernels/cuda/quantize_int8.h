// Symmetric int8 quantization of rows, on the GPU.
#pragma once

#include <cstdint>

#include "../cpu/float_type.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace dtm_fast {

// x     : [M, K] of type, row stride x_stride
// q     : [M, K] int8, row stride q_stride >= K; the entries from K to q_stride become 0
// scale : [M] float32
//
//   scale[m] = max_k |x[m, k]| / 127
//   q[m, k]  = clamp(round_half_to_even(x[m, k] / scale[m]), -127, 127)      (both divisions as IEEE says)
//
// A row whose scale is 0 becomes zeros. A row that holds a NaN or an infinity becomes zeros, and its scale
// NaN. The bits are those of the CPU kernels.
struct QuantizeInt8 {
  FloatType type;
  const void* x;
  int64_t x_stride;
  int64_t M, K;
  int8_t* q;
  int64_t q_stride;
  float* scale;
};

// Queued on the stream of the current device; does not wait. Throws std::runtime_error if the launch fails.
// Kernels that were launched behind it as programmatic dependents may begin at once; they see its results
// after griddepcontrol.wait.
void quantize_int8_cuda(const QuantizeInt8& args, CUstream_st* stream);

}  // namespace dtm_fast
