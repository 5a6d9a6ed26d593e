// Packed panels and a register-blocked micro-kernel, after Goto & van de Geijn, "Anatomy of High-Performance
// Matrix Multiplication" (ACM TOMS 34(3), 2008).
#include <immintrin.h>

#include <cstring>

#include "avx2_vectors.h"
#include "gemm_tile.h"

namespace dtm_fast {
namespace {

constexpr int64_t kPanelCols = 16;  // two vectors of weight rows
constexpr int64_t kMaxRows = 6;     // 12 accumulators, 2 weight vectors, 1 broadcast: 15 of 16 registers

template <FloatType type>
__m256 load_8(const void* row, int64_t index) {
  if (type == FloatType::kFloat32) return _mm256_loadu_ps(static_cast<const float*>(row) + index);
  const __m128i bits =
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(row) + index));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// The first count elements, zeros behind them.
template <FloatType type>
__m256 load_up_to_8(const void* row, int64_t index, int64_t count) {
  if (count >= 8) return load_8<type>(row, index);
  alignas(32) char copy[32] = {};
  std::memcpy(copy, static_cast<const char*>(row) + index * size_of(type),
              static_cast<size_t>(count * size_of(type)));
  return load_8<type>(copy, 0);
}

const void* row_of(const void* matrix, FloatType type, int64_t stride, int64_t row) {
  return static_cast<const char*>(matrix) + row * stride * size_of(type);
}

// out [rows, kGemmBlockK] = float32(x[i0 : i0 + rows, k0 : k0 + depth])
template <FloatType type>
void pack_x(const GemmTile& tile, int64_t i0, int64_t rows, int64_t k0, int64_t depth, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const void* row = row_of(tile.x, type, tile.x_stride, i0 + i);
    for (int64_t k = 0; k < depth; k += 8) {
      _mm256_storeu_ps(out + i * kGemmBlockK + k, load_up_to_8<type>(row, k0 + k, depth - k));
    }
  }
}

// Lane i is all ones where bit i of the byte is set.
__m256 lanes_of(uint8_t byte) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(byte), bit), bit));
}

// panel [depth rounded up to 8, kPanelCols] = transposed weight[j0 : j0 + kPanelCols, k0 : k0 + depth],
// masked; columns beyond the tile are zero. Masking clears bits, so a NaN that is masked out does not count.
template <FloatType type>
void pack_panel(const GemmTile& tile, int64_t variant, int64_t j0, int64_t k0, int64_t depth, float* panel) {
  for (int64_t half = 0; half < kPanelCols; half += 8) {
    for (int64_t k = 0; k < depth; k += 8) {
      __m256 r[8];
      for (int64_t i = 0; i < 8; ++i) {
        const int64_t j = j0 + half + i;
        r[i] = _mm256_setzero_ps();
        if (j >= tile.cols) continue;
        r[i] = load_up_to_8<type>(row_of(tile.weight, type, tile.weight_stride, j), k0 + k, depth - k);
        if (tile.mask != nullptr) {
          const uint8_t* row = tile.mask + variant * tile.mask_variant_stride + j * tile.mask_row_stride;
          r[i] = _mm256_and_ps(r[i], lanes_of(row[(k0 + k) / 8]));
        }
      }
      transpose_8x8(r);
      for (int64_t i = 0; i < 8; ++i) _mm256_storeu_ps(panel + (k + i) * kPanelCols + half, r[i]);
    }
  }
}

// c[0 : kRows, 0 : cols] = (first ? 0 : c) + x[0 : kRows, :depth] @ panel, where x has row stride kGemmBlockK
template <int kRows>
void multiply(const float* x, const float* panel, int64_t depth, bool first, float* c, int64_t c_stride,
              int64_t cols) {
  __m256 sum[kRows][2];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
  for (int64_t k = 0; k < depth; ++k) {
    const __m256 w0 = _mm256_loadu_ps(panel + k * kPanelCols);
    const __m256 w1 = _mm256_loadu_ps(panel + k * kPanelCols + 8);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const __m256 value = _mm256_set1_ps(x[i * kGemmBlockK + k]);
      sum[i][0] = _mm256_fmadd_ps(value, w0, sum[i][0]);
      sum[i][1] = _mm256_fmadd_ps(value, w1, sum[i][1]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
    float* row = c + i * c_stride;
    alignas(32) float old[kPanelCols] = {};
    if (!first) std::memcpy(old, row, static_cast<size_t>(cols) * sizeof(float));
    _mm256_store_ps(old, _mm256_add_ps(_mm256_load_ps(old), sum[i][0]));
    _mm256_store_ps(old + 8, _mm256_add_ps(_mm256_load_ps(old + 8), sum[i][1]));
    std::memcpy(row, old, static_cast<size_t>(cols) * sizeof(float));
  }
}

using Multiply = void(const float* x, const float* panel, int64_t depth, bool first, float* c,
                      int64_t c_stride, int64_t cols);
constexpr Multiply* kMultiply[kMaxRows + 1] = {nullptr,     multiply<1>, multiply<2>, multiply<3>,
                                               multiply<4>, multiply<5>, multiply<6>};

// The loops are in the order of the AVX-512 twin.
template <FloatType type>
void gemm_tile(const GemmTile& tile) {
  float* const x = tile.scratch;
  float* const panels = tile.scratch + kMaxRows * kGemmBlockK;
  for (int64_t v = 0; v < tile.variants && tile.K == 0; ++v) {
    for (int64_t i = 0; i < tile.rows; ++i) {
      float* row = tile.c + v * tile.c_variant_stride + i * tile.c_stride;
      for (int64_t j = 0; j < tile.cols; ++j) row[j] = 0.0f;
    }
  }
  for (int64_t k0 = 0; k0 < tile.K; k0 += kGemmBlockK) {
    const int64_t depth = tile.K - k0 < kGemmBlockK ? tile.K - k0 : kGemmBlockK;
    float* panel = panels;
    for (int64_t v = 0; v < tile.variants; ++v) {
      for (int64_t j0 = 0; j0 < tile.cols; j0 += kPanelCols, panel += kPanelCols * kGemmBlockK) {
        pack_panel<type>(tile, v, j0, k0, depth, panel);
      }
    }
    const int64_t blocks = (tile.rows + kMaxRows - 1) / kMaxRows;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t i0 = b * tile.rows / blocks, rows = (b + 1) * tile.rows / blocks - i0;
      pack_x<type>(tile, i0, rows, k0, depth, x);
      panel = panels;
      for (int64_t v = 0; v < tile.variants; ++v) {
        float* c = tile.c + v * tile.c_variant_stride + i0 * tile.c_stride;
        for (int64_t j0 = 0; j0 < tile.cols; j0 += kPanelCols, panel += kPanelCols * kGemmBlockK) {
          const int64_t cols = tile.cols - j0 < kPanelCols ? tile.cols - j0 : kPanelCols;
          kMultiply[rows](x, panel, depth, k0 == 0, c + j0, tile.c_stride, cols);
        }
      }
    }
  }
}

}  // namespace

void gemm_tile_avx2(const GemmTile& tile) {
  tile.type == FloatType::kFloat32 ? gemm_tile<FloatType::kFloat32>(tile)
                                   : gemm_tile<FloatType::kBfloat16>(tile);
}

}  // namespace dtm_fast
