// masked_linear for few tokens, where reading the weight takes longer than multiplying by it.
#pragma once

#include <cstdint>

#include "gemm_tile.h"

namespace dtm_fast {

// Up to this many tokens; from 48 on, gemm_tile was faster on a Xeon of 2 MiB of second-level cache.
constexpr int64_t kFewTokens = 32;

// Up to this many, the lanes of vectors are weight rows; with more of them tokens, 16 at a time.
constexpr int64_t kFewestTokens = 8;

// How the weight is fetched ahead of its use. Where rows are long, always as kNextVectors.
enum class Fetch {
  kNextVectors,  // the next vectors of the 16 rows at hand
  // The next 16 rows one after the other, so that memory is read in one long run, into which cache:
  kRunsToFirstLevel,
  kRunsToSecondLevel,
};

// What gemm_tile.h says of a tile, to the last bit; tile.mask must be given. The weight is read once for all
// variants, row by row as it lies in memory.
//
// x            : what few_tokens_x makes of tile.x, once for all tiles
// tile.scratch : few_tokens_scratch(tile.variants) floats
using MaskedFewTokens = void(const GemmTile& tile, const float* x, Fetch fetch);
MaskedFewTokens masked_few_tokens_avx512;
MaskedFewTokens masked_few_tokens_avx512_bf16;  // for bfloat16, in the order of its gemm_tile

// For at most kFewestTokens: a panel of 16 weight rows and the masks of each variant, both transposed.
static constexpr int64_t few_tokens_scratch(int64_t variants) { return (16 + 2 * variants) * kGemmBlockK; }

// out : float32, padded with zeros: up to kFewestTokens [ceil(K / kGemmBlockK), rows, kGemmBlockK], otherwise
// [ceil(rows / 16), K rounded up to kGemmBlockK, 16]; with AVX512-BF16 pairs of bfloat16
using FewTokensX = void(FloatType type, const void* x, int64_t x_stride, int64_t rows, int64_t K, float* out);
FewTokensX few_tokens_x_avx512;
FewTokensX few_tokens_x_avx512_bf16;

static constexpr int64_t few_tokens_x_size(int64_t rows, int64_t K) {
  return (K + kGemmBlockK - 1) / kGemmBlockK * kGemmBlockK *
         (rows <= kFewestTokens ? rows : (rows + 15) / 16 * 16);
}

}  // namespace dtm_fast
