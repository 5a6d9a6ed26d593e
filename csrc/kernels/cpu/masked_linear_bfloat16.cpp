#include "masked_linear_bfloat16.h"

#include <algorithm>

#include "bfloat16_tiles.h"
#include "parallel_for.h"
#include "row_tiles.h"
#include "scratch_buffer.h"

namespace dtm_fast {
namespace {

// Rows of x that are packed at a time, which bounds the memory that this takes.
constexpr int64_t kChunkRows = 4096;
// A block of x of so many rows, the sums of a tile and a panel of weights share the second-level cache.
constexpr int64_t kTileRows = 512;
constexpr int64_t kTileSums = 128 * 1024;
constexpr int64_t kTileVariants = 8;
constexpr int64_t kPanelCols = 32;
constexpr int64_t kMostTileCols = 256;

// As many columns as the cache allows, since every tile reads all of its x; but enough tiles to go round.
int64_t tile_cols(int64_t variants, int64_t rows, int64_t N, int num_threads) {
  const int64_t in_cache = kTileSums / masked_linear_tile_sums(variants, rows, kPanelCols);
  const int64_t to_share = N / (4 * num_threads * kPanelCols);
  return kPanelCols * std::clamp<int64_t>(std::min(in_cache, to_share), 1, kMostTileCols / kPanelCols);
}

// y[:, m0 : m0 + rows], rows <= kChunkRows
void multiply_chunk(const MaskedLinear& args, int64_t m0, int64_t rows, uint16_t* packed, int num_threads) {
  const uint16_t* x = static_cast<const uint16_t*>(args.x) + m0 * args.x_stride;
  const int64_t group_rows = rows_of_groups(rows), group_size = bfloat16_group_size(args.K, group_rows);
  parallel_for((rows + kBfloat16Group - 1) / kBfloat16Group, num_threads, [&](int64_t group, int) {
    const int64_t first = group * kBfloat16Group;
    pack_bfloat16_group_amx(x + first * args.x_stride, args.x_stride, std::min(kBfloat16Group, rows - first),
                            args.K, packed + group * group_size, group_rows);
  });
  const int64_t tile_variants = std::min(kTileVariants, args.V);
  const int64_t tile_rows = std::min(kTileRows, rows);
  const int64_t cols = tile_cols(tile_variants, tile_rows, args.N, num_threads);
  const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t col_tiles = (args.N + cols - 1) / cols;
  const int64_t tasks = row_tiles * col_tiles * ((args.V + kTileVariants - 1) / kTileVariants);
  ScratchBuffer<float> sums(threads_used(tasks, num_threads),
                            masked_linear_tile_sums(tile_variants, tile_rows, cols));
  const auto multiply = rows > kFewRows                        ? masked_linear_tile_amx
                        : rows <= kBfloat16Group && args.V > 1 ? masked_linear_few_masks_amx
                                                               : masked_linear_few_amx;
  parallel_for(tasks, num_threads, [&](int64_t task, int thread) {
    // Row tiles of one column tile follow each other, so that its weights are read from memory once.
    const int64_t i0 = task % row_tiles * kTileRows;
    MaskedLinearTile tile;
    tile.m0 = m0 + i0;
    tile.n0 = task / row_tiles % col_tiles * cols;
    tile.v0 = task / row_tiles / col_tiles * kTileVariants;
    tile.rows = std::min(kTileRows, rows - i0);
    tile.cols = std::min(cols, args.N - tile.n0);
    tile.variants = std::min(kTileVariants, args.V - tile.v0);
    tile.x = packed + i0 / kBfloat16Group * group_size;
    tile.group_rows = group_rows;
    tile.sums = sums.part(thread);
    multiply(args, tile);
  });
}

// Rows of x as tiles, each task multiplying some of them by all of the packed weight; false where that does
// not pay.
bool by_rows(const MaskedLinear& args, int num_threads) {
  const RowTiles tiles = {args.M, args.N, 2 * args.K};
  const int64_t task_rows = tiles.rows_of_task(num_threads);
  if (task_rows == 0) return false;
  const int64_t tasks = (args.M + task_rows - 1) / task_rows, blocks = RowTiles::blocks(task_rows);
  const int threads = threads_used(tasks, num_threads);
  ScratchBuffer<char> weight(1, tiles.weight_bytes());
  ScratchBuffer<char> rows(threads, blocks * tiles.block_bytes());
  ScratchBuffer<float> sums(threads, blocks * kBlockSums);
  for (int64_t v = 0; v < args.V; ++v) {
    parallel_for(RowTiles::blocks(args.N), num_threads, [&](int64_t block, int) {
      masked_pack_weight_amx(args, v, block, weight.part(0) + block * tiles.block_bytes());
    });
    parallel_for(tasks, num_threads, [&](int64_t task, int thread) {
      const int64_t m0 = task * task_rows;
      masked_linear_rows_amx(args, v, weight.part(0), m0, std::min(task_rows, args.M - m0),
                             {rows.part(thread), sums.part(thread)});
    });
  }
  return true;
}

}  // namespace

void masked_linear_bfloat16(const MaskedLinear& args, int num_threads) {
  if (by_rows(args, num_threads)) return;
  const int64_t groups = (std::min(kChunkRows, args.M) + kBfloat16Group - 1) / kBfloat16Group;
  ScratchBuffer<uint16_t> packed(1, groups * bfloat16_group_size(args.K));
  for (int64_t m0 = 0; m0 < args.M; m0 += kChunkRows) {
    multiply_chunk(args, m0, std::min(kChunkRows, args.M - m0), packed.part(0), num_threads);
  }
}

}  // namespace dtm_fast
