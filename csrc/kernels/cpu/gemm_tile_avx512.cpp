// Packed panels and a register-blocked micro-kernel, after Goto & van de Geijn, "Anatomy of High-Performance
// Matrix Multiplication" (ACM TOMS 34(3), 2008).
#include <immintrin.h>

#include "avx512_vectors.h"
#include "gemm_tile.h"

namespace dtm_fast {
namespace {

constexpr int64_t kPanelCols = 32;  // two vectors of weight rows
constexpr int kTileRows = 12;       // 24 accumulators, 2 weight vectors, 1 broadcast: 27 of 32 registers

const void* row_of(const void* matrix, FloatType type, int64_t stride, int64_t row) {
  return static_cast<const char*>(matrix) + row * stride * size_of(type);
}

// scratch [rows, kGemmBlockK] = float32(x[:, k0 : k0 + depth])
template <FloatType type>
void pack_x(const GemmTile& tile, int64_t k0, int64_t depth, float* scratch) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    const void* row = row_of(tile.x, type, tile.x_stride, i);
    for (int64_t k = 0; k < depth; k += 16) {
      _mm512_storeu_ps(scratch + i * kGemmBlockK + k, load_16<type>(row, k0 + k, first_lanes(depth - k)));
    }
  }
}

// Bits k .. k + 15 of a mask row of K bits; the row may end after the first of the two bytes.
__mmask16 mask_bits(const uint8_t* mask_row, int64_t k, int64_t K) {
  const unsigned low = mask_row[k / 8];
  const unsigned high = k + 8 < K ? mask_row[k / 8 + 1] : 0u;
  return static_cast<__mmask16>(low | high << 8);
}

// panel [depth rounded up to 16, kPanelCols] = transposed weight[j0 : j0 + kPanelCols, k0 : k0 + depth],
// masked; columns beyond the tile are zero. Lanes that are masked out are never read, so what they hold does
// not count.
template <FloatType type>
void pack_panel(const GemmTile& tile, int64_t variant, int64_t j0, int64_t k0, int64_t depth, float* panel) {
  for (int64_t half = 0; half < kPanelCols; half += 16) {
    for (int64_t k = 0; k < depth; k += 16) {
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t j = j0 + half + i;
        r[i] = _mm512_setzero_si512();
        if (j >= tile.cols) continue;
        __mmask16 lanes = first_lanes(depth - k);
        if (tile.mask != nullptr) {
          const uint8_t* row = tile.mask + variant * tile.mask_variant_stride + j * tile.mask_row_stride;
          lanes = static_cast<__mmask16>(lanes & mask_bits(row, k0 + k, tile.K));
        }
        r[i] = _mm512_castps_si512(
            load_16<type>(row_of(tile.weight, type, tile.weight_stride, j), k0 + k, lanes));
      }
      transpose_16x16(r);
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(panel + (k + i) * kPanelCols + half, r[i]);
    }
  }
}

// c[0 : kRows, 0 : cols] += x[0 : kRows, :depth] @ panel, where x has row stride kGemmBlockK
template <int kRows>
void multiply(const float* x, const float* panel, int64_t depth, float* c, int64_t c_stride, int64_t cols) {
  __m512 sum[kRows][2];
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; ++k) {
    const __m512 w0 = _mm512_loadu_ps(panel + k * kPanelCols);
    const __m512 w1 = _mm512_loadu_ps(panel + k * kPanelCols + 16);
    for (int i = 0; i < kRows; ++i) {
      const __m512 value = _mm512_set1_ps(x[i * kGemmBlockK + k]);
      sum[i][0] = _mm512_fmadd_ps(value, w0, sum[i][0]);
      sum[i][1] = _mm512_fmadd_ps(value, w1, sum[i][1]);
    }
  }
  const __mmask16 lanes0 = first_lanes(cols);
  const __mmask16 lanes1 = cols > 16 ? first_lanes(cols - 16) : __mmask16{0};
  for (int i = 0; i < kRows; ++i) {
    float* row = c + i * c_stride;
    _mm512_mask_storeu_ps(row, lanes0, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes0, row), sum[i][0]));
    _mm512_mask_storeu_ps(row + 16, lanes1,
                          _mm512_add_ps(_mm512_maskz_loadu_ps(lanes1, row + 16), sum[i][1]));
  }
}

void multiply_rows(const GemmTile& tile, const float* x, const float* panel, int64_t depth, float* c,
                   int64_t cols) {
  int64_t i = 0;
  for (; i + kTileRows <= tile.rows; i += kTileRows) {
    multiply<kTileRows>(x + i * kGemmBlockK, panel, depth, c + i * tile.c_stride, tile.c_stride, cols);
  }
  for (; i + 4 <= tile.rows; i += 4) {
    multiply<4>(x + i * kGemmBlockK, panel, depth, c + i * tile.c_stride, tile.c_stride, cols);
  }
  for (; i < tile.rows; ++i) {
    multiply<1>(x + i * kGemmBlockK, panel, depth, c + i * tile.c_stride, tile.c_stride, cols);
  }
}

template <FloatType type>
void gemm_tile(const GemmTile& tile) {
  float* x = tile.scratch;
  float* panel = tile.scratch + tile.rows * kGemmBlockK;
  for (int64_t v = 0; v < tile.variants; ++v) {
    for (int64_t i = 0; i < tile.rows; ++i) {
      float* row = tile.c + v * tile.c_variant_stride + i * tile.c_stride;
      for (int64_t j = 0; j < tile.cols; ++j) row[j] = 0.0f;
    }
  }
  for (int64_t k0 = 0; k0 < tile.K; k0 += kGemmBlockK) {
    const int64_t depth = tile.K - k0 < kGemmBlockK ? tile.K - k0 : kGemmBlockK;
    pack_x<type>(tile, k0, depth, x);
    for (int64_t j0 = 0; j0 < tile.cols; j0 += kPanelCols) {
      const int64_t cols = tile.cols - j0 < kPanelCols ? tile.cols - j0 : kPanelCols;
      // All variants of a panel follow each other, so that the weight is read from memory once.
      for (int64_t v = 0; v < tile.variants; ++v) {
        pack_panel<type>(tile, v, j0, k0, depth, panel);
        multiply_rows(tile, x, panel, depth, tile.c + v * tile.c_variant_stride + j0, cols);
      }
    }
  }
}

}  // namespace

void gemm_tile_avx512(const GemmTile& tile) {
  tile.type == FloatType::kFloat32 ? gemm_tile<FloatType::kFloat32>(tile)
                                   : gemm_tile<FloatType::kBfloat16>(tile);
}

}  // namespace dtm_fast
