#include "gemm_panel_avx512.h"

namespace dtm_fast {
namespace {

// The order of the loops: all panels of a block of K are packed first and stay in the second-level cache (256
// KiB for 256 columns, or 32 columns and 8 variants). 12 rows of x, packed into the first-level cache, are
// then multiplied by one panel after the other, whose one long stream the machine prefetches by itself.
template <FloatType type>
void gemm_tile(const GemmTile& tile) {
  float* const x = tile.scratch;
  float* const panels = tile.scratch + kMaxRows * kGemmBlockK;
  if (tile.K == 0) set_to_zero(tile);
  for (int64_t k0 = 0; k0 < tile.K; k0 += kGemmBlockK) {
    const int64_t depth = tile.K - k0 < kGemmBlockK ? tile.K - k0 : kGemmBlockK;
    float* panel = panels;
    for (int64_t v = 0; v < tile.variants; ++v) {
      const uint8_t* mask = tile.mask == nullptr ? nullptr : tile.mask + v * tile.mask_variant_stride;
      for (int64_t j0 = 0; j0 < tile.cols; j0 += kPanelCols, panel += kPanelSize) {
        for (int64_t half = 0; half < kPanelCols; half += 16) {
          const char* next = element(tile.weight, type, tile.weight_stride, j0 + half + 16, k0);
          pack_16_columns<type>(tile, mask, j0 + half, k0, depth, next, panel + half);
        }
      }
    }
    for_each_row_block(tile.rows, [&](int64_t i0, int64_t rows) {
      pack_x<type>(tile, i0, rows, k0, depth, x);
      const float* each = panels;
      for (int64_t v = 0; v < tile.variants; ++v) {
        float* c = tile.c + v * tile.c_variant_stride + i0 * tile.c_stride;
        for (int64_t j0 = 0; j0 < tile.cols; j0 += kPanelCols, each += kPanelSize) {
          const int64_t cols = tile.cols - j0 < kPanelCols ? tile.cols - j0 : kPanelCols;
          kMultiply<false>[rows](x, each, nullptr, depth, k0 == 0, c + j0, tile.c_stride, cols);
        }
      }
    });
  }
}

}  // namespace

void gemm_tile_avx512(const GemmTile& tile) {
  tile.type == FloatType::kFloat32 ? gemm_tile<FloatType::kFloat32>(tile)
                                   : gemm_tile<FloatType::kBfloat16>(tile);
}

}  // namespace dtm_fast
