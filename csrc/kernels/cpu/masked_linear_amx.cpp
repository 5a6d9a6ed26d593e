#include "bfloat16_panel.h"
#include "masked_linear_bfloat16.h"
#include "masked_linear_store_amx.h"

namespace dtm_fast {
void masked_linear_tile_amx(const MaskedLinear& args, const MaskedLinearTile& tile) {
  const TilesInUse tiles;
  alignas(64) uint16_t panel[kPanelRows * kPanelStride];
  const int64_t group_size = bfloat16_group_size(args.K);
  const int64_t groups = (tile.rows + kBfloat16Group - 1) / kBfloat16Group;
  const int64_t panels = (tile.cols + kPanelRows - 1) / kPanelRows;
  const int64_t most_depth = bfloat16_block_depth(args.K, kLongestBlock);
  WeightRows w;
  w.weight = static_cast<const uint16_t*>(args.weight) + tile.n0 * args.weight_stride;
  w.weight_stride = args.weight_stride;
  w.mask_stride = args.mask_row_stride;
  w.rows = tile.cols;
  w.K = args.K;
  for (int64_t k0 = 0; k0 == 0 || k0 < args.K; k0 += most_depth) {
    const int64_t depth = args.K - k0 < most_depth ? args.K - k0 : most_depth;
    const uint16_t* x = tile.x + k0 * kBfloat16Group;
    for (int64_t p = 0; p < panels; ++p) {
      const bool last = p + 1 == panels;
      const int64_t next_row = last ? 0 : (p + 1) * kPanelRows;
      const int64_t next_k = !last ? k0 : k0 + depth < args.K ? k0 + depth : 0;
      // All variants of a panel follow each other, so that the weight is read from memory once.
      for (int64_t v = 0; v < tile.variants; ++v) {
        w.mask = args.mask + (tile.v0 + v) * args.mask_variant_stride + tile.n0 * args.mask_row_stride;
        copy_panel(w, p * kPanelRows, k0, depth, next_row, next_k, panel);
        float* sums = tile.sums + (v * panels + p) * groups * kSumBlock;
        int64_t g = 0;
        for (; g + 2 <= groups; g += 2) {
          multiply_groups<2>(panel, depth, x + g * group_size, group_size, k0 == 0, sums + g * kSumBlock);
        }
        if (g < groups) {
          multiply_groups<1>(panel, depth, x + g * group_size, group_size, k0 == 0, sums + g * kSumBlock);
        }
      }
    }
    if (args.K == 0) break;
  }
  for (int64_t v = 0; v < tile.variants; ++v) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t i = g * kBfloat16Group;
      const int64_t rows = tile.rows - i < kBfloat16Group ? tile.rows - i : kBfloat16Group;
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t j = p * kPanelRows;
        const int64_t cols = tile.cols - j < kPanelRows ? tile.cols - j : kPanelRows;
        store_block(args, tile.v0 + v, tile.m0 + i, rows, tile.n0 + j, cols,
                    tile.sums + ((v * panels + p) * groups + g) * kSumBlock);
      }
    }
  }
}

}  // namespace dtm_fast
