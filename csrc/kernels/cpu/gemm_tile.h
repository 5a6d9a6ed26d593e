// One tile of x @ weight^T in float32, the weight optionally masked: what masked_linear and token_divergence
// share.
#pragma once

#include <cstdint>

#include "cpu_features.h"
#include "float_type.h"

namespace dtm_fast {

// x      : [rows, K] of type, row stride x_stride
// weight : [cols, K] of type, row stride weight_stride
// mask   : [variants, cols, ceil(K / 8)] bits, lowest first, or nullptr (then variants is 1)
// c      : [variants, rows, cols] float32, row stride c_stride, variant stride c_variant_stride
//
//   c[v, i, j] = sum_k float32(x[i, k]) * (bit k of mask[v, j] ? float32(weight[j, k]) : 0)
//
// The sum has one fixed order, whatever the tile and the instruction set: K is cut into blocks of
// kGemmBlockK, a block is summed from zero by one fused multiply-add after the other, and the blocks are
// added to zero in order. So c[v, i, j] depends on nothing but row i of x and row j of the weight, to the
// last bit.
struct GemmTile {
  FloatType type;
  const void* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride;
  const uint8_t* mask;
  int64_t mask_row_stride, mask_variant_stride;
  int64_t variants, rows, cols, K;
  float* c;
  int64_t c_stride, c_variant_stride;
  float* scratch;  // gemm_tile_scratch(rows) floats
};

constexpr int64_t kGemmBlockK = 256;

// Rows in a tile: a multiple of the 6 (AVX2) and 12 (AVX-512) rows that a micro-kernel keeps in registers,
// small enough that a block of x ([240, 256] float32) stays in the second-level cache.
constexpr int64_t kGemmTileRows = 240;

// A packed block of x and a packed panel of at most 32 weight rows.
static constexpr int64_t gemm_tile_scratch(int64_t rows) { return (rows + 32) * kGemmBlockK; }

using GemmTileKernel = void(const GemmTile& tile);
GemmTileKernel gemm_tile_avx2;
GemmTileKernel gemm_tile_avx512;

GemmTileKernel* gemm_tile_kernel(CpuIsa isa);

}  // namespace dtm_fast
