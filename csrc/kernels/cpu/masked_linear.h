// Linear layer with a bitmask over its weight; several masks of one weight in one pass.
#pragma once

#include <cstdint>

#include "cpu_features.h"
#include "float_type.h"

namespace dtm_fast {

// x      : [M, K] of type, row stride x_stride
// weight : [N, K] of type, row stride weight_stride
// mask   : [V, N, ceil(K / 8)] bits, lowest first
// bias   : [N] float32, or nullptr
// y      : [V, M, N] of type, contiguous
//
//   y[v, m, n] = type(sum_k float32(x[m, k]) * (bit k of mask[v, n] ? float32(weight[n, k]) : 0) + bias[n])
//
// The order of the sum is that of gemm_tile.h, or on AMX that of bfloat16_tiles.h and float32_pieces.h.
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

void masked_linear(CpuIsa isa, const MaskedLinear& args, int num_threads);

}  // namespace dtm_fast
