#include "masked_linear.h"

#include <algorithm>

#include "gemm_tile.h"
#include "masked_linear_bfloat16.h"
#include "parallel_for.h"
#include "scratch_buffer.h"
#include "store_float.h"

namespace dtm_fast {
namespace {

constexpr int64_t kTileCols = 64;
// More masks than this are done in several passes, which bounds the scratch of a thread to half a megabyte.
constexpr int64_t kTileVariants = 8;

void store_tile(const MaskedLinear& args, const GemmTile& tile, int64_t v0, int64_t m0, int64_t n0) {
  for (int64_t v = 0; v < tile.variants; ++v) {
    for (int64_t i = 0; i < tile.rows; ++i) {
      float* row = tile.c + v * tile.c_variant_stride + i * tile.c_stride;
      if (args.bias != nullptr) {
        for (int64_t j = 0; j < tile.cols; ++j) row[j] += args.bias[n0 + j];
      }
      store_floats(args.y, args.type, ((v0 + v) * args.M + m0 + i) * args.N + n0, row, tile.cols);
    }
  }
}

}  // namespace

void masked_linear(CpuIsa isa, const MaskedLinear& args, int num_threads) {
  require_cpu_isa(isa);
  if (isa == CpuIsa::kAmx && args.type == FloatType::kBfloat16) {
    return masked_linear_bfloat16(args, num_threads);
  }
  GemmTileKernel* const gemm_tile = gemm_tile_kernel(isa);
  const int64_t row_tiles = (args.M + kGemmTileRows - 1) / kGemmTileRows;
  const int64_t col_tiles = (args.N + kTileCols - 1) / kTileCols;
  const int64_t variant_tiles = (args.V + kTileVariants - 1) / kTileVariants;
  const int64_t tasks = row_tiles * col_tiles * variant_tiles;
  const int64_t tile_rows = std::min(kGemmTileRows, args.M);
  const int64_t c_size = std::min(kTileVariants, args.V) * tile_rows * kTileCols;
  ScratchBuffer<float> scratch(threads_used(tasks, num_threads), c_size + gemm_tile_scratch(tile_rows));
  parallel_for(tasks, num_threads, [&](int64_t task, int thread) {
    // Row tiles of one column tile follow each other, so that its weights are read from memory once.
    const int64_t m0 = task % row_tiles * kGemmTileRows;
    const int64_t n0 = task / row_tiles % col_tiles * kTileCols;
    const int64_t v0 = task / row_tiles / col_tiles * kTileVariants;
    GemmTile tile;
    tile.type = args.type;
    tile.x = static_cast<const char*>(args.x) + m0 * args.x_stride * size_of(args.type);
    tile.x_stride = args.x_stride;
    tile.weight = static_cast<const char*>(args.weight) + n0 * args.weight_stride * size_of(args.type);
    tile.weight_stride = args.weight_stride;
    tile.mask = args.mask + v0 * args.mask_variant_stride + n0 * args.mask_row_stride;
    tile.mask_row_stride = args.mask_row_stride;
    tile.mask_variant_stride = args.mask_variant_stride;
    tile.variants = std::min(kTileVariants, args.V - v0);
    tile.rows = std::min(kGemmTileRows, args.M - m0);
    tile.cols = std::min(kTileCols, args.N - n0);
    tile.K = args.K;
    tile.c = scratch.part(thread);
    tile.c_stride = kTileCols;
    tile.c_variant_stride = tile_rows * kTileCols;
    tile.scratch = tile.c + c_size;
    gemm_tile(tile);
    store_tile(args, tile, v0, m0, n0);
  });
}

}  // namespace dtm_fast
