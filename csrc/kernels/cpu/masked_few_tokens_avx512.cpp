#include "gemm_panel_avx512.h"
#include "masked_few_tokens.h"

namespace dtm_fast {
namespace {

constexpr int64_t kFusedRows = 16;
constexpr int64_t kBytes = kGemmBlockK / 8;  // of a mask row in a block of K

// kept[kept_index(k) + 64 * h] bit i = bit k0 + k of mask row j0 + 16 * h + i for k < depth: the lanes of the
// panel's row k that count. The bytes of a mask row are bits of 8 k; they are transposed as bytes, and then
// the sign bits of 16 bytes are the lanes of one k.
void transpose_mask(const GemmTile& tile, const uint8_t* mask, int64_t j0, int64_t k0, int64_t depth,
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

// One mask and at most kFusedRows tokens: 16 weight rows are multiplied as soon as they are transposed, from
// registers, so that their memory is read at one even pace from the first k to the last.
template <FloatType type, int kRows>
void multiply_fused(const GemmTile& tile, const float* x) {
  constexpr int64_t kAhead = 8;  // cache lines
  for (int64_t j0 = 0; j0 < tile.cols; j0 += 16) {
    __m512 total[kRows];
    for (int i = 0; i < kRows; ++i) total[i] = _mm512_setzero_ps();
    for (int64_t k0 = 0; k0 < tile.K; k0 += kGemmBlockK) {
      const int64_t depth = tile.K - k0 < kGemmBlockK ? tile.K - k0 : kGemmBlockK;
      const float* x_block = x + k0 * kRows;
      __m512 sum[kRows];
      for (int i = 0; i < kRows; ++i) sum[i] = _mm512_setzero_ps();
      for (int64_t k = 0; k < depth; k += kVectorK<type>) {
        __m512i r[16];
        const int64_t ahead = k0 + k + kAhead * kVectorK<type>;
        const char* next = ahead < tile.K
                               ? element(tile.weight, type, tile.weight_stride, j0, ahead)
                               : element(tile.weight, type, tile.weight_stride, j0 + 16, ahead - tile.K);
        load_transposed<type>(tile, tile.mask, j0, k0 + k, depth - k, next, r);
        DTM_FAST_UNROLL
        for (int64_t t = 0; t < 16; ++t) {
          for (int i = 0; i < kRows; ++i) {
            const float* at = x_block + i * kGemmBlockK + k;
            if (type == FloatType::kFloat32) {
              sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(at[t]), _mm512_castsi512_ps(r[t]), sum[i]);
            } else {
              sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(at[2 * t]), _mm512_castsi512_ps(lower_of_pairs(r[t])),
                                       sum[i]);
              sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(at[2 * t + 1]),
                                       _mm512_castsi512_ps(higher_of_pairs(r[t])), sum[i]);
            }
          }
        }
      }
      for (int i = 0; i < kRows; ++i) total[i] = _mm512_add_ps(total[i], sum[i]);
    }
    const __mmask16 lanes = first_lanes(tile.cols - j0);
    for (int i = 0; i < kRows; ++i) _mm512_mask_storeu_ps(tile.c + i * tile.c_stride + j0, lanes, total[i]);
  }
}

template <FloatType type>
void multiply_panels(const GemmTile& tile, const float* x) {
  float* const panel = tile.scratch;
  __mmask16* const kept = reinterpret_cast<__mmask16*>(tile.scratch + kPanelSize);
  const bool one_mask = tile.variants == 1;  // is applied while the weight is read
  if (tile.K == 0) set_to_zero(tile);
  for (int64_t j0 = 0; j0 < tile.cols; j0 += kPanelCols) {
    const int64_t cols = tile.cols - j0 < kPanelCols ? tile.cols - j0 : kPanelCols;
    for (int64_t k0 = 0; k0 < tile.K; k0 += kGemmBlockK) {
      const int64_t depth = tile.K - k0 < kGemmBlockK ? tile.K - k0 : kGemmBlockK;
      const bool last = k0 + kGemmBlockK >= tile.K;
      for (int64_t half = 0; half < kPanelCols; half += 16) {
        const int64_t next_j = half == 0 ? j0 + 16 : last ? j0 + kPanelCols : j0;
        const int64_t next_k = half == 0 ? k0 : last ? 0 : k0 + kGemmBlockK;
        pack_16_columns<type>(tile, one_mask ? tile.mask : nullptr, j0 + half, k0, depth,
                              element(tile.weight, type, tile.weight_stride, next_j, next_k), panel + half);
      }
      const float* x_block = x + k0 * tile.rows;
      for (int64_t v = 0; v < tile.variants; ++v) {
        if (!one_mask) transpose_mask(tile, tile.mask + v * tile.mask_variant_stride, j0, k0, depth, kept);
        float* c = tile.c + v * tile.c_variant_stride + j0;
        for_each_row_block(tile.rows, [&](int64_t i0, int64_t rows) {
          const auto& multiply = one_mask ? kMultiply<false> : kMultiply<true>;
          multiply[rows](x_block + i0 * kGemmBlockK, panel, kept, depth, k0 == 0, c + i0 * tile.c_stride,
                         tile.c_stride, cols);
        });
      }
    }
  }
}

using Fused = void(const GemmTile& tile, const float* x);

template <FloatType type>
constexpr Fused* kFused[kFusedRows + 1] = {nullptr,
                                           multiply_fused<type, 1>,
                                           multiply_fused<type, 2>,
                                           multiply_fused<type, 3>,
                                           multiply_fused<type, 4>,
                                           multiply_fused<type, 5>,
                                           multiply_fused<type, 6>,
                                           multiply_fused<type, 7>,
                                           multiply_fused<type, 8>,
                                           multiply_fused<type, 9>,
                                           multiply_fused<type, 10>,
                                           multiply_fused<type, 11>,
                                           multiply_fused<type, 12>,
                                           multiply_fused<type, 13>,
                                           multiply_fused<type, 14>,
                                           multiply_fused<type, 15>,
                                           multiply_fused<type, 16>};

template <FloatType type>
void multiply_tile(const GemmTile& tile, const float* x) {
  tile.variants == 1 && tile.rows <= kFusedRows ? kFused<type>[tile.rows](tile, x)
                                                : multiply_panels<type>(tile, x);
}

template <FloatType type>
void copy_x(const GemmTile& tile, float* out) {
  for (int64_t k0 = 0; k0 < tile.K; k0 += kGemmBlockK) {
    const int64_t depth = tile.K - k0 < kGemmBlockK ? tile.K - k0 : kGemmBlockK;
    pack_x<type>(tile, 0, tile.rows, k0, depth, out + k0 * tile.rows);
  }
}

}  // namespace

void masked_few_tokens_avx512(const GemmTile& tile, const float* x) {
  tile.type == FloatType::kFloat32 ? multiply_tile<FloatType::kFloat32>(tile, x)
                                   : multiply_tile<FloatType::kBfloat16>(tile, x);
}

void few_tokens_x_avx512(FloatType type, const void* x, int64_t x_stride, int64_t rows, int64_t K,
                         float* out) {
  GemmTile tile = {};
  tile.x = x;
  tile.x_stride = x_stride;
  tile.rows = rows;
  tile.K = K;
  type == FloatType::kFloat32 ? copy_x<FloatType::kFloat32>(tile, out)
                              : copy_x<FloatType::kBfloat16>(tile, out);
}

}  // namespace dtm_fast
