// The fused kernel of masked_few_tokens.h: 16 weight rows are multiplied as soon as they are transposed, from
// registers, so that their memory is read at one even pace from the first k to the last. Included only by
// files compiled for at least AVX-512; everything is in an anonymous namespace, so that no copy can reach a
// file of a lower instruction set.
#pragma once

#include "gemm_panel_avx512.h"
#include "masked_few_tokens.h"

namespace dtm_fast {
namespace {

constexpr int64_t kFusedRows = 16;

// Adds to kRows sums the products of the lanes that a vector of 16 transposed weight rows holds. x is at the
// first of these lanes, in rows of kGemmBlockK.
template <FloatType type, typename Lanes, int kRows>
inline void add_vector(const __m512i r[16], const float* x, __m512 sum[kRows]) {
  DTM_FAST_UNROLL
  for (int64_t t = 0; t < 16; ++t) {
    for (int i = 0; i < kRows; ++i) {
      const float* at = x + i * kGemmBlockK;
      if (type == FloatType::kFloat32 || Lanes::kLaneK == 2) {
        sum[i] = Lanes::add_product(sum[i], _mm512_set1_ps(at[t]), _mm512_castsi512_ps(r[t]));
      } else {
        const __m512 lower = _mm512_castsi512_ps(lower_of_pairs(r[t]));
        const __m512 higher = _mm512_castsi512_ps(higher_of_pairs(r[t]));
        sum[i] = Lanes::add_product(sum[i], _mm512_set1_ps(at[2 * t]), lower);
        sum[i] = Lanes::add_product(sum[i], _mm512_set1_ps(at[2 * t + 1]), higher);
      }
    }
  }
}

// Rows i0 .. i0 + kRows - 1 of one variant.
template <FloatType type, typename Lanes, int kRows>
void multiply_fused(const GemmTile& tile, const float* x, int64_t j0, int64_t v, int64_t i0) {
  constexpr int64_t kAhead = 8;  // cache lines
  const uint8_t* mask = tile.mask + v * tile.mask_variant_stride;
  __m512 total[kRows];
  for (int i = 0; i < kRows; ++i) total[i] = _mm512_setzero_ps();
  for (int64_t k0 = 0; k0 < tile.K; k0 += kBlockK<Lanes>) {
    const int64_t depth = block_depth<Lanes>(tile.K, k0);
    const float* x_block = x + k0 / Lanes::kLaneK * tile.rows + i0 * kGemmBlockK;
    __m512 sum[kRows];
    for (int i = 0; i < kRows; ++i) sum[i] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += kVectorK<type>) {
      const int64_t ahead = k0 + k + kAhead * kVectorK<type>;
      const char* next = ahead < tile.K
                             ? element(tile.weight, type, tile.weight_stride, j0, ahead)
                             : element(tile.weight, type, tile.weight_stride, j0 + 16, ahead - tile.K);
      __m512i r[16];
      load_transposed<type>(tile, mask, j0, k0 + k, depth - k, next, r);
      add_vector<type, Lanes, kRows>(r, x_block + k / Lanes::kLaneK, sum);
    }
    for (int i = 0; i < kRows; ++i) total[i] = _mm512_add_ps(total[i], sum[i]);
  }
  const __mmask16 lanes = first_lanes(tile.cols - j0);
  float* c = tile.c + v * tile.c_variant_stride + i0 * tile.c_stride + j0;
  for (int i = 0; i < kRows; ++i) _mm512_mask_storeu_ps(c + i * tile.c_stride, lanes, total[i]);
}

using Fused = void(const GemmTile& tile, const float* x, int64_t j0, int64_t v, int64_t i0);

// By the number of rows.
template <FloatType type, typename Lanes>
constexpr Fused* kFused[kFusedRows + 1] = {nullptr,
                                           multiply_fused<type, Lanes, 1>,
                                           multiply_fused<type, Lanes, 2>,
                                           multiply_fused<type, Lanes, 3>,
                                           multiply_fused<type, Lanes, 4>,
                                           multiply_fused<type, Lanes, 5>,
                                           multiply_fused<type, Lanes, 6>,
                                           multiply_fused<type, Lanes, 7>,
                                           multiply_fused<type, Lanes, 8>,
                                           multiply_fused<type, Lanes, 9>,
                                           multiply_fused<type, Lanes, 10>,
                                           multiply_fused<type, Lanes, 11>,
                                           multiply_fused<type, Lanes, 12>,
                                           multiply_fused<type, Lanes, 13>,
                                           multiply_fused<type, Lanes, 14>,
                                           multiply_fused<type, Lanes, 15>,
                                           multiply_fused<type, Lanes, 16>};

// The whole tile. After the first variant and rows, the 16 weight rows come from the cache.
template <FloatType type, typename Lanes>
void multiply_all_fused(const GemmTile& tile, const float* x) {
  const int64_t row_blocks = (tile.rows + kFusedRows - 1) / kFusedRows;
  for (int64_t j0 = 0; j0 < tile.cols; j0 += 16) {
    for (int64_t v = 0; v < tile.variants; ++v) {
      for (int64_t b = 0; b < row_blocks; ++b) {
        const int64_t i0 = b * tile.rows / row_blocks;
        kFused<type, Lanes>[(b + 1) * tile.rows / row_blocks - i0](tile, x, j0, v, i0);
      }
    }
  }
}

template <FloatType type, typename Lanes>
void copy_x(const void* x, int64_t x_stride, int64_t rows, int64_t K, float* out) {
  GemmTile tile = {};
  tile.x = x;
  tile.x_stride = x_stride;
  for (int64_t k0 = 0; k0 < K; k0 += kBlockK<Lanes>) {
    pack_x<type, Lanes>(tile, 0, rows, k0, block_depth<Lanes>(K, k0), out + k0 / Lanes::kLaneK * rows);
  }
}

}  // namespace
}  // namespace dtm_fast
