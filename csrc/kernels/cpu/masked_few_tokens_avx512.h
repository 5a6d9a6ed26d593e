// The kernels of masked_few_tokens.h. With one variant, 16 weight rows are multiplied as soon as they are
// transposed, from registers, so that their memory is read at one even pace from the first k to the last.
// Included only by files compiled for at least AVX-512; everything is in an anonymous namespace, so that no
// copy can reach a file of a lower instruction set.
#pragma once

#include "masked_few_tokens.h"
#include "masked_token_lanes_avx512.h"
#include "masked_variants_avx512.h"

namespace dtm_fast {
namespace {

// Adds to kRows sums the products of the lanes that a vector of 16 transposed weight rows holds. x is at the
// first of these lanes, in rows of kGemmBlockK.
template <FloatType type, typename Lanes, int kRows>
DTM_FAST_INLINE void add_vector(const __m512i r[16], const float* x, __m512 sum[kRows]) {
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

// 16 weight rows of one variant.
template <FloatType type, typename Lanes, int kRows>
void multiply_fused(const GemmTile& tile, const float* x, int64_t j0, Fetch fetch) {
  const SixteenRows w(tile, tile.mask, j0, type);
  const WeightAhead<type> ahead(tile, w, j0, true, fetch);
  __m512 total[kRows];
  for (int i = 0; i < kRows; ++i) total[i] = _mm512_setzero_ps();
  for (int64_t k0 = 0; k0 < tile.K; k0 += kBlockK<Lanes>) {
    const int64_t depth = block_depth<Lanes>(tile.K, k0);
    const float* x_block = x + k0 / Lanes::kLaneK * kRows;
    __m512 sum[kRows];
    for (int i = 0; i < kRows; ++i) sum[i] = _mm512_setzero_ps();
    const auto lines = [&](int64_t k) { return ahead.lines(k0 + k); };
    for_each_vector<type>(w, k0, depth, lines,
                          [&](int64_t k, const __m512i r[16]) __attribute__((always_inline)) {
                            add_vector<type, Lanes, kRows>(r, x_block + k / Lanes::kLaneK, sum);
                          });
    for (int i = 0; i < kRows; ++i) total[i] = _mm512_add_ps(total[i], sum[i]);
  }
  const __mmask16 lanes = first_lanes(tile.cols - j0);
  for (int i = 0; i < kRows; ++i) _mm512_mask_storeu_ps(tile.c + i * tile.c_stride + j0, lanes, total[i]);
}

using SixteenColumns = void(const GemmTile& tile, const float* x, int64_t j0, Fetch fetch);

// By the number of rows.
template <FloatType type, typename Lanes>
constexpr SixteenColumns* kFused[kFewestTokens + 1] = {nullptr,
                                                       multiply_fused<type, Lanes, 1>,
                                                       multiply_fused<type, Lanes, 2>,
                                                       multiply_fused<type, Lanes, 3>,
                                                       multiply_fused<type, Lanes, 4>,
                                                       multiply_fused<type, Lanes, 5>,
                                                       multiply_fused<type, Lanes, 6>,
                                                       multiply_fused<type, Lanes, 7>,
                                                       multiply_fused<type, Lanes, 8>};
template <FloatType type, typename Lanes>
constexpr SixteenColumns* kShared[kFewestTokens + 1] = {nullptr,
                                                        multiply_shared<type, Lanes, 1>,
                                                        multiply_shared<type, Lanes, 2>,
                                                        multiply_shared<type, Lanes, 3>,
                                                        multiply_shared<type, Lanes, 4>,
                                                        multiply_shared<type, Lanes, 5>,
                                                        multiply_shared<type, Lanes, 6>,
                                                        multiply_shared<type, Lanes, 7>,
                                                        multiply_shared<type, Lanes, 8>};

template <FloatType type, typename Lanes>
void multiply_few(const GemmTile& tile, const float* x, Fetch wanted) {
  if (tile.K == 0) return set_to_zero(tile);
  const Fetch fetch = possible_fetch(wanted, tile);
  WeightAhead<type>::start(tile, fetch);
  if (tile.rows <= kFewestTokens) {
    const auto& multiply = tile.variants == 1 ? kFused<type, Lanes> : kShared<type, Lanes>;
    for (int64_t j0 = 0; j0 < tile.cols; j0 += 16) multiply[tile.rows](tile, x, j0, fetch);
    return;
  }
  for (int64_t j0 = 0; j0 < tile.cols; j0 += 16) {
    for (int64_t v = 0; v < tile.variants; ++v) {
      for (int64_t i0 = 0; i0 < tile.rows; i0 += kTokens) {
        const int64_t rows = tile.rows - i0 < kTokens ? tile.rows - i0 : kTokens;
        multiply_tokens<type, Lanes>(tile, x + few_tokens_x_size(i0, tile.K) / Lanes::kLaneK, j0, v, fetch,
                                     v == 0 && i0 == 0, rows,
                                     tile.c + v * tile.c_variant_stride + i0 * tile.c_stride + j0);
      }
    }
  }
}

template <FloatType type, typename Lanes>
void pack_few(const void* x, int64_t x_stride, int64_t rows, int64_t K, float* out) {
  GemmTile tile = {};
  tile.x = x;
  tile.x_stride = x_stride;
  if (rows <= kFewestTokens) {
    for (int64_t k0 = 0; k0 < K; k0 += kBlockK<Lanes>) {
      pack_x<type, Lanes>(tile, 0, rows, k0, block_depth<Lanes>(K, k0), out + k0 / Lanes::kLaneK * rows);
    }
    return;
  }
  for (int64_t i0 = 0; i0 < rows; i0 += kTokens) {
    transpose_tokens<type, Lanes>(element(x, type, x_stride, i0, 0), x_stride,
                                  rows - i0 < kTokens ? rows - i0 : kTokens, K,
                                  out + few_tokens_x_size(i0, K) / Lanes::kLaneK);
  }
}

}  // namespace
}  // namespace dtm_fast
