// Linear layer over a packed sparse weight.
#pragma once

#include <cstdint>

#include "cpu_features.h"
#include "float_type.h"
#include "sparse_format.h"

namespace dtm_fast {

// x    : [M, K] of type, row stride x_stride
// bias : [N] float32, or nullptr
// y    : [M, N] of type, contiguous
//
//   y[m, n] = type(sum over the kept k of float32(x[m, k]) * value[n, k] + bias[n])
//
// Order of the sum: one fused multiply-add after the other, ascending k, from 0, with one of 0 * 0 for every
// padding. It depends on neither M, the threads nor the instruction set.
struct SparseLinear {
  FloatType type;
  const void* x;
  int64_t x_stride;
  SparseWeight weight;
  const float* bias;
  int64_t M;
  void* y;
};

// Throws std::invalid_argument if the steps do not sum up to value_steps and column_words. Whatever else the
// packed tensors hold, nothing outside of them is read and nothing outside of y is written; but where no
// entry of `rows` names a row of the weight, its outputs are undefined.
void sparse_linear(CpuIsa isa, const SparseLinear& args, int num_threads);

// One block of a panel, as the kernels see it.
struct SparseBlock {
  const float* values;
  const uint8_t* columns;
  const uint16_t* rows;
  const uint8_t* steps;
  int64_t groups;
};

// A part of y, `rows` rows of row_bytes each, stride bytes apart: fetched little by little while a block is
// multiplied, which leaves the memory idle, so that storing y need not wait for it.
struct SparseAhead {
  const char* address;
  int64_t stride, rows, row_bytes;
};

// Tokens of a tile; x and c have this row stride.
constexpr int64_t kSparseTokens = 64;
// Rows of x that a block addresses: its columns and the padding's.
constexpr int64_t kSparseBlockRows = kSparseBlock + 1;

// The kernels of one instruction set.
struct SparseKernels {
  // xt [kSparseBlockRows, kSparseTokens] = transposed float32(x[0 : tokens, k0 : k0 + depth]), 0 elsewhere
  void (*transpose_x)(FloatType type, const void* x, int64_t x_stride, int64_t k0, int64_t depth,
                      int64_t tokens, float* xt);
  // c [groups * kSparseLanes + 1, kSparseTokens] = weight[block] @ xt + (first ? 0 : c), for the first
  // `tokens` columns (and some more) of the rows that block.rows names. May fetch y into the cache.
  void (*multiply)(const SparseBlock& block, const float* xt, int64_t tokens, bool first,
                   const SparseAhead& y, float* c);
  // y [0 : tokens, n0 : n0 + rows] = type(transposed c[0 : rows] + bias)
  void (*store_y)(const float* c, int64_t rows, int64_t tokens, const float* bias, FloatType type, void* y,
                  int64_t y_stride, int64_t n0);
  // c [tokens, c_stride] += x [tokens, kSparseBlockRows] @ weight[block].T; tokens <= few_tokens, which is 0
  // where there is no such kernel
  void (*multiply_few)(const SparseBlock& block, const float* x, int64_t tokens, float* c, int64_t c_stride);
  int64_t few_tokens;
};

extern const SparseKernels kSparseAvx2, kSparseAvx512;

}  // namespace dtm_fast
