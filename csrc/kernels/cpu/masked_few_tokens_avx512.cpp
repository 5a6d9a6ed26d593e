#include "masked_few_tokens_fused.h"

namespace dtm_fast {
namespace {

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
        pack_16_columns<type, FloatLanes>(tile, one_mask ? tile.mask : nullptr, j0 + half, k0, depth,
                                          element(tile.weight, type, tile.weight_stride, next_j, next_k),
                                          panel + half);
      }
      const float* x_block = x + k0 * tile.rows;
      for (int64_t v = 0; v < tile.variants; ++v) {
        if (!one_mask) transpose_mask(tile, tile.mask + v * tile.mask_variant_stride, j0, k0, depth, kept);
        float* c = tile.c + v * tile.c_variant_stride + j0;
        for_each_row_block(tile.rows, [&](int64_t i0, int64_t rows) {
          const auto& multiply = one_mask ? kMultiply<FloatLanes, false> : kMultiply<FloatLanes, true>;
          multiply[rows](x_block + i0 * kGemmBlockK, panel, kept, depth, k0 == 0, c + i0 * tile.c_stride,
                         tile.c_stride, cols);
        });
      }
    }
  }
}

template <FloatType type>
void multiply_few(const GemmTile& tile, const float* x) {
  tile.variants == 1 && tile.rows <= kFusedRows ? multiply_all_fused<type, FloatLanes>(tile, x)
                                                : multiply_panels<type>(tile, x);
}

}  // namespace

void masked_few_tokens_avx512(const GemmTile& tile, const float* x) {
  tile.type == FloatType::kFloat32 ? multiply_few<FloatType::kFloat32>(tile, x)
                                   : multiply_few<FloatType::kBfloat16>(tile, x);
}

void few_tokens_x_avx512(FloatType type, const void* x, int64_t x_stride, int64_t rows, int64_t K,
                         float* out) {
  type == FloatType::kFloat32 ? copy_x<FloatType::kFloat32, FloatLanes>(x, x_stride, rows, K, out)
                              : copy_x<FloatType::kBfloat16, FloatLanes>(x, x_stride, rows, K, out);
}

}  // namespace dtm_fast
