// Linear layer with V nested masks over its weight: one pass gives all outputs.
#pragma once

#include <cstdint>

#include "cpu_features.h"
#include "float_type.h"

namespace dtm_fast {

// x      : [M, K] of type, row stride x_stride
// weight : [N, K] of type, row stride weight_stride
// mask   : [V, N, ceil(K / 8)] bits, lowest first, strides mask_level_stride and mask_row_stride; each level
//          keeps a part of what the level before it keeps; bits beyond K are not looked at
// bias   : [N] float32, or nullptr
// y      : [V, M, N] of type, contiguous
//
//   y[v, m, n] = type(sum over the k that mask[v, n] keeps of float32(x[m, k]) * float32(weight[n, k]) +
//   bias[n])
//
// Order of the sum: first the k of the sparsest level, then those that each denser level adds, ascending
// within a level; one fused multiply-add after the other, from 0, with one of 0 * 0 for every padding of the
// packed increment (sparse_format.h). It depends on the masks v to V - 1, but on neither the masks before v
// nor M, the threads or the instruction set.
struct MaskedLadder {
  FloatType type;
  const void* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride;
  const uint8_t* mask;
  int64_t mask_row_stride, mask_level_stride;
  const float* bias;
  int64_t V, M, N, K;
  void* y;
};

void masked_ladder(CpuIsa isa, const MaskedLadder& args, int num_threads);

// y [0 : tokens, 0 : rows] = transposed c [rows, kSparseTokens] + bias, past the caches. rows is a multiple
// of 16, and every row of y begins a cache line.
void stream_y_avx512(const float* c, int64_t rows, int64_t tokens, const float* bias, float* y,
                     int64_t y_stride);

}  // namespace dtm_fast
