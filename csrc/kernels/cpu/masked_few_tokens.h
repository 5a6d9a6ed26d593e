// masked_linear for few tokens, where reading the weight takes longer than multiplying by it.
#pragma once

#include <cstdint>

#include "gemm_tile.h"

namespace dtm_fast {

// Up to this many tokens; from 48 on, gemm_tile was faster on a Xeon of 2 MiB of second-level cache.
constexpr int64_t kFewTokens = 32;

// What gemm_tile.h says of a tile, to the last bit; tile.mask must be given. The weight is read once for all
// variants, row by row as it lies in memory.
//
// x            : what few_tokens_x makes of tile.x, once for all tiles
// tile.scratch : kFewTokensScratch floats
using MaskedFewTokens = void(const GemmTile& tile, const float* x);
MaskedFewTokens masked_few_tokens_avx512;
MaskedFewTokens masked_few_tokens_avx512_bf16;  // for bfloat16, in the order of its gemm_tile

// A panel of 32 weight rows and the lane masks of one variant.
constexpr int64_t kFewTokensScratch = 33 * kGemmBlockK;

// out : float32 [ceil(K / kGemmBlockK), rows, kGemmBlockK], x padded with zeros; with AVX512-BF16 pairs of
// bfloat16, half as many
using FewTokensX = void(FloatType type, const void* x, int64_t x_stride, int64_t rows, int64_t K, float* out);
FewTokensX few_tokens_x_avx512;
FewTokensX few_tokens_x_avx512_bf16;

static constexpr int64_t few_tokens_x_size(int64_t rows, int64_t K) {
  return (K + kGemmBlockK - 1) / kGemmBlockK * kGemmBlockK * rows;
}

}  // namespace dtm_fast
