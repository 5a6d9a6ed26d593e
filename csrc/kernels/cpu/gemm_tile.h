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
// The sum has one fixed order, whatever the tile: K is cut into blocks of kGemmBlockK, a block is summed from
// zero by one fused multiply-add after the other, and the blocks are added to zero in order. So c[v, i, j]
// depends on nothing but row i of x and row j of the weight, to the last bit. This order is that of AVX2 and
// AVX-512. With AVX512-BF16, bfloat16 has another one: blocks of 2 * kGemmBlockK, in which k and k + 1 change
// places for every even k (one of 0 * 0 where k + 1 is K), and denormal numbers are taken as zero, operands
// as well as results of the fused multiply-adds.
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
  float* scratch;  // gemm_tile_scratch(variants * (cols rounded up to 32)) floats
};

constexpr int64_t kGemmBlockK = 256;

// Rows in a tile at most: the more, the less often the weight is packed.
constexpr int64_t kGemmTileRows = 512;

// A block of at most 12 rows of x, and all weight rows of a block of K, in panels of 32. cols: times
// variants.
static constexpr int64_t gemm_tile_scratch(int64_t cols) {
  return (12 + (cols + 31) / 32 * 32) * kGemmBlockK;
}

using GemmTileKernel = void(const GemmTile& tile);
GemmTileKernel gemm_tile_avx2;
GemmTileKernel gemm_tile_avx512;
GemmTileKernel gemm_tile_avx512_bf16;  // for bfloat16

GemmTileKernel* gemm_tile_kernel(CpuIsa isa, FloatType type);

}  // namespace dtm_fast
