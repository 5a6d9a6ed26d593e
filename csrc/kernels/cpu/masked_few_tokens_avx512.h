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

// The weight is fetched in one of two ways. On a Zen 5 it was 20% faster to fetch the next 16 rows one after
// the other, so that memory is read in one long run, than the next vectors of the same 16 rows; on a Xeon of
// the fourth generation slower. These and the 16 rows at hand share the second-level cache.
constexpr bool kRuns = true;
constexpr int64_t kLongestRun = 20 * 1024;

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
void multiply_fused(const GemmTile& tile, const float* x, int64_t j0, int64_t v) {
  constexpr int64_t kAhead = 8;  // cache lines
  const bool in_runs = kRuns && tile.weight_stride == tile.K && tile.K * size_of(type) <= kLongestRun;
  const SixteenRows w(tile, tile.mask + v * tile.mask_variant_stride, j0, type);
  __m512 total[kRows];
  for (int i = 0; i < kRows; ++i) total[i] = _mm512_setzero_ps();
  for (int64_t k0 = 0; k0 < tile.K; k0 += kBlockK<Lanes>) {
    const int64_t depth = block_depth<Lanes>(tile.K, k0);
    const float* x_block = x + k0 / Lanes::kLaneK * kRows;
    __m512 sum[kRows];
    for (int i = 0; i < kRows; ++i) sum[i] = _mm512_setzero_ps();
    const auto ahead = [&](int64_t k) {
      if (in_runs) return Lines{w.weight + 16 * (w.weight_bytes + (k0 + k) * size_of(type)), 64};
      const int64_t at = k0 + k + kAhead * kVectorK<type>;
      const int64_t from = at < w.K ? at * size_of(type) : 16 * w.weight_bytes + (at - w.K) * size_of(type);
      return Lines{w.weight + from, w.weight_bytes};
    };
    for_each_vector<type>(w, k0, depth, ahead,
                          [&](int64_t k, const __m512i r[16]) __attribute__((always_inline)) {
                            add_vector<type, Lanes, kRows>(r, x_block + k / Lanes::kLaneK, sum);
                          });
    for (int i = 0; i < kRows; ++i) total[i] = _mm512_add_ps(total[i], sum[i]);
  }
  const __mmask16 lanes = first_lanes(tile.cols - j0);
  float* c = tile.c + v * tile.c_variant_stride + j0;
  for (int i = 0; i < kRows; ++i) _mm512_mask_storeu_ps(c + i * tile.c_stride, lanes, total[i]);
}

using Fused = void(const GemmTile& tile, const float* x, int64_t j0, int64_t v);

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

constexpr int64_t kBytes = kGemmBlockK / 8;  // of a mask row in a block of K

// kept[kept_index(k) + 64 * h] bit i = bit k0 + k of mask row j0 + 16 * h + i for k < depth: the lanes of the
// panel's row k that count. The bytes of a mask row are bits of 8 k; they are transposed as bytes, and then
// the sign bits of 16 bytes are the lanes of one k.
inline void transpose_mask(const GemmTile& tile, const uint8_t* mask, int64_t j0, int64_t k0, int64_t depth,
                           __mmask16* kept) {
  // bytes[q][j] = the 8 bytes of row j for k0 + 64 * q ...
  alignas(64) uint8_t bytes[kBytes / 8][kPanelCols][8] = {};
  const int64_t rows = tile.cols - j0 < kPanelCols ? tile.cols - j0 : kPanelCols;
  const int64_t count = (depth + 7) / 8;
  for (int64_t j = 0; j < rows; ++j) {
    const uint8_t* row = mask + (j0 + j) * tile.mask_row_stride + k0 / 8;
    _mm_prefetch(reinterpret_cast<const char*>(row + 2 * kBytes), _MM_HINT_T0);
    int64_t b = 0;
    for (; b + 8 <= count; b += 8) std::memcpy(bytes[b / 8][j], row + b, 8);
    for (; b < count; ++b) bytes[b / 8][j][b % 8] = row[b];
  }
  // Within 16 bytes: byte b of row 0, byte b of row 1, for b = 0 .. 7.
  const __m512i pairs =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
  // Word 4 * b + p = word b of the 16 bytes p: then 8 bytes are byte b of 8 rows.
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i % 4 * 8 + i / 4);
  const __m512i words = _mm512_load_si512(order);
  for (int64_t q = 0; q * 64 < depth; ++q) {
    __m512i rows_of_8[4];
    for (int64_t g = 0; g < 4; ++g) {
      const __m512i each = _mm512_load_si512(bytes[q][8 * g]);
      rows_of_8[g] = _mm512_permutexvar_epi16(words, _mm512_shuffle_epi8(each, pairs));
    }
    for (int64_t h = 0; h < 2; ++h) {
      // 16 bytes are byte b of 16 rows, b = 0, 2, 4, 6 and 1, 3, 5, 7.
      const __m512i even = _mm512_unpacklo_epi64(rows_of_8[2 * h], rows_of_8[2 * h + 1]);
      const __m512i odd = _mm512_unpackhi_epi64(rows_of_8[2 * h], rows_of_8[2 * h + 1]);
      for (int bit = 0; bit < 8; ++bit) {
        const __m128i left = _mm_cvtsi32_si128(7 - bit);
        const uint64_t even_lanes = _mm512_movepi8_mask(_mm512_sll_epi16(even, left));
        const uint64_t odd_lanes = _mm512_movepi8_mask(_mm512_sll_epi16(odd, left));
        __mmask16* out = kept + kept_index(64 * q + bit) + 64 * h;
        std::memcpy(out, &even_lanes, sizeof even_lanes);
        std::memcpy(out + kept_index(8), &odd_lanes, sizeof odd_lanes);
      }
    }
  }
}

// 32 weight rows and a block of K at a time, packed into a panel in the first-level cache. Several variants
// of floats share the panel: the lanes that count are then masked while it is read. Masking pairs of bfloat16
// costs nothing while they are packed, and their masks would be costly to transpose, so they are packed once
// for each variant, from the cache.
template <FloatType type, typename Lanes>
void multiply_panels(const GemmTile& tile, const float* x) {
  float* const panel = tile.scratch;
  __mmask16* const kept = reinterpret_cast<__mmask16*>(tile.scratch + kPanelSize);
  const bool shared = Lanes::kLaneK == 1 && tile.variants > 1;
  if (tile.K == 0) set_to_zero(tile);
  for (int64_t j0 = 0; j0 < tile.cols; j0 += kPanelCols) {
    const int64_t cols = tile.cols - j0 < kPanelCols ? tile.cols - j0 : kPanelCols;
    for (int64_t k0 = 0; k0 < tile.K; k0 += kBlockK<Lanes>) {
      const int64_t depth = block_depth<Lanes>(tile.K, k0);
      const int64_t lanes = (depth + Lanes::kLaneK - 1) / Lanes::kLaneK;
      const bool last = k0 + kBlockK<Lanes> >= tile.K;
      const float* x_block = x + k0 / Lanes::kLaneK * tile.rows;
      for (int64_t v = 0; v < tile.variants; ++v) {
        const uint8_t* mask = tile.mask + v * tile.mask_variant_stride;
        for (int64_t half = 0; half < kPanelCols && (v == 0 || !shared); half += 16) {
          const int64_t next_j = half == 0 ? j0 + 16 : last ? j0 + kPanelCols : j0;
          const int64_t next_k = half == 0 ? k0 : last ? 0 : k0 + kBlockK<Lanes>;
          pack_16_columns<type, Lanes>(tile, shared ? nullptr : mask, j0 + half, k0, depth,
                                       element(tile.weight, type, tile.weight_stride, next_j, next_k),
                                       panel + half);
        }
        if (shared) transpose_mask(tile, mask, j0, k0, depth, kept);
        float* c = tile.c + v * tile.c_variant_stride + j0;
        for_each_row_block(tile.rows, [&](int64_t i0, int64_t rows) {
          const auto& multiply = shared ? kMultiply<Lanes, true> : kMultiply<Lanes, false>;
          multiply[rows](x_block + i0 * kGemmBlockK, panel, kept, lanes, k0 == 0, c + i0 * tile.c_stride,
                         tile.c_stride, cols);
        });
      }
    }
  }
}

template <FloatType type, typename Lanes>
void multiply_few(const GemmTile& tile, const float* x) {
  if (tile.rows > kFusedRows || (Lanes::kLaneK == 1 && tile.variants > 1)) {
    return multiply_panels<type, Lanes>(tile, x);
  }
  for (int64_t j0 = 0; j0 < tile.cols; j0 += 16) {
    for (int64_t v = 0; v < tile.variants; ++v) kFused<type, Lanes>[tile.rows](tile, x, j0, v);
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
