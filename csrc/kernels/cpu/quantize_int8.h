// Symmetric int8 quantization of rows.
#pragma once

#include <cstdint>

#include "cpu_features.h"
#include "float_type.h"

namespace dtm_fast {

// x        : [M, K] of x_type, row stride x_stride elements
// qx       : [M, K] int8, row stride K
// scale    : [M] float32
//
//   scale[m] = max_k |x[m, k]| / 127                                 (float32)
//   qx[m, k] = clamp(round_half_even(x[m, k] / scale[m]), -127, 127)  (true division)
//
// A row whose scale is 0 has qx = 0. A row that holds a NaN or an infinity has qx = 0 and scale = NaN.
struct QuantizeInt8 {
  const void* x;
  FloatType x_type;
  int64_t x_stride;
  int64_t M, K;
  int8_t* qx;
  float* scale;
};

void quantize_int8(CpuIsa isa, const QuantizeInt8& args, int num_threads);

// One row; returns its scale.
float quantize_int8_row_avx2(const void* x, FloatType x_type, int64_t K, int8_t* qx);

// A few rows: x is read twice, and between the two a cache is to hold it.
void quantize_int8_rows_avx512(const void* x, FloatType x_type, int64_t x_stride, int64_t rows, int64_t K,
                               int8_t* qx, float* scale);

}  // namespace dtm_fast
