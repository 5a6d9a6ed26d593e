// Product of int8 activations and int8 weights with one scale per row of each.
#pragma once

#include <cstdint>

#include "cpu_features.h"
#include "float_type.h"

namespace dtm_fast {

// qx       : [M, K] int8 in [-127, 127], row stride K
// scale_x  : [M] float32
// qweight  : [N, K] int8 in [-128, 127], row stride qweight_stride
// scale_w  : [N] float32
// bias     : [N] float32, or nullptr
// y        : [M, N] of y_type, row stride N
//
//   acc[m, n] = sum_k qx[m, k] * qweight[n, k]                                        (int32, exact)
//   y[m, n]   = y_type(float32(acc[m, n]) * (scale_x[m] * scale_w[n]) + bias[n])      (each step rounded)
//
// K <= kInt8LinearMaxK. Since |qx * qweight| <= 2^14, every sum over so many stays below 2^31. A kernel may
// pass through larger sums (VNNI adds 128 to qx and takes 128 * sum_k qweight[n, k] away again): int32
// additions wrap modulo 2^32, so the final value is right whenever it fits.
struct Int8Linear {
  const int8_t* qx;
  const float* scale_x;
  const int8_t* qweight;
  int64_t qweight_stride;
  const float* scale_w;
  const float* bias;
  int64_t M, N, K;
  void* y;
  FloatType y_type;
};

constexpr int64_t kInt8LinearMaxK = (int64_t{1} << 17) - 1;

void int8_linear(CpuIsa isa, const Int8Linear& args, int num_threads);

// acc[i, j] = sum_k qx[i, k] * qweight[j, k] for i < rows, j < cols; qx has row stride K, acc row stride
// acc_stride.
using Int8DotTile = void(const int8_t* qx, int64_t rows, const int8_t* qweight, int64_t qweight_stride,
                         int64_t cols, int64_t K, int32_t* acc, int64_t acc_stride);
Int8DotTile int8_dot_tile_avx2;
Int8DotTile int8_dot_tile_avx512;
Int8DotTile int8_dot_tile_avx512_vnni;

}  // namespace dtm_fast
