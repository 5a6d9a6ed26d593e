#include "masked_linear_float32.h"

#include <algorithm>

#include "parallel_for.h"
#include "scratch_buffer.h"

namespace dtm_fast {
namespace {

// The sums of a tile and a block of x of so many rows share the second-level cache.
constexpr int64_t kTileRows = 512;
constexpr int64_t kTileSums = 256 * 1024;
constexpr int64_t kTileVariants = 8;
constexpr int64_t kPanelCols = 32;
constexpr int64_t kMostTileCols = 1024;
constexpr int64_t kMostFewCols = 512;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// y cut into tiles: enough to go round, and otherwise as wide as can be, since each reads all of its x.
class Tiling {
 public:
  Tiling(const MaskedLinear& args, int64_t most_cols, int num_threads)
      : args_(args),
        row_tiles_(ceil_div(args.M, kTileRows)),
        rows_(ceil_div(ceil_div(args.M, row_tiles_), kBfloat16Group) * kBfloat16Group),
        variants_(std::min(kTileVariants, args.V)) {
    const int64_t in_cache = kTileSums / float32_tile_sums(variants_, rows_, kPanelCols);
    const int64_t to_share = args.N * row_tiles_ / (4 * num_threads * kPanelCols);
    const int64_t most = std::clamp<int64_t>(std::min(in_cache, to_share), 1, most_cols / kPanelCols);
    const int64_t panels = ceil_div(args.N, kPanelCols);
    cols_ = ceil_div(panels, ceil_div(panels, most)) * kPanelCols;
    col_tiles_ = ceil_div(args.N, cols_);
  }

  int64_t tasks() const { return row_tiles_ * col_tiles_ * ceil_div(args_.V, variants_); }
  int64_t sums() const { return float32_tile_sums(variants_, rows_, cols_); }
  int64_t block_of_x() const { return rows_ / kBfloat16Group * piece_group_size(kLongestPieceBlock); }

  // Row tiles of one column tile follow each other, so that its weights are read from memory once.
  Float32Tile tile(int64_t task, RowMark* marks) const {
    const int64_t m0 = task % row_tiles_ * rows_, n0 = task / row_tiles_ % col_tiles_ * cols_;
    const int64_t v0 = task / row_tiles_ / col_tiles_ * variants_;
    return {v0,
            m0,
            n0,
            std::min(variants_, args_.V - v0),
            std::min(rows_, args_.M - m0),
            std::min(cols_, args_.N - n0),
            marks + m0};
  }

 private:
  const MaskedLinear& args_;
  int64_t row_tiles_, rows_, variants_, cols_, col_tiles_;
};

void few_rows(const MaskedLinear& args, int num_threads, RowMark* marks) {
  const Tiling tiling(args, kMostFewCols, num_threads);
  const int64_t group_rows = rows_of_groups(args.M), group_size = piece_group_size(args.K, group_rows);
  const int64_t groups = ceil_div(args.M, kBfloat16Group);
  ScratchBuffer<uint16_t> x(1, groups * group_size);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t m = g * kBfloat16Group;
    pack_float32_group_amx(static_cast<const float*>(args.x) + m * args.x_stride, args.x_stride,
                           std::min(kBfloat16Group, args.M - m), args.K, x.part(0) + g * group_size,
                           group_rows);
  }
  const bool masks = args.V > 1 && groups == 1;
  const auto multiply = masks ? masked_linear_few_masks_float32_amx : masked_linear_few_float32_amx;
  parallel_for(tiling.tasks(), num_threads,
               [&](int64_t task, int) { multiply(args, tiling.tile(task, marks), x.part(0)); });
}

void many_rows(const MaskedLinear& args, int num_threads, RowMark* marks) {
  const Tiling tiling(args, kMostTileCols, num_threads);
  const int threads = threads_used(tiling.tasks(), num_threads);
  ScratchBuffer<uint16_t> blocks_of_x(threads, tiling.block_of_x());
  ScratchBuffer<float> sums(threads, tiling.sums());
  const bool eights = !PieceBlocks(args.K).is_one_eight();
  ScratchBuffer<float> of_eight(threads, eights ? tiling.sums() : 0);
  parallel_for(tiling.tasks(), num_threads, [&](int64_t task, int thread) {
    masked_linear_float32_amx(
        args, tiling.tile(task, marks),
        {blocks_of_x.part(thread), sums.part(thread), eights ? of_eight.part(thread) : nullptr});
  });
}

}  // namespace

void masked_linear_float32(const MaskedLinear& args, int num_threads, RowMark* marks) {
  args.M <= kFewFloat32Rows ? few_rows(args, num_threads, marks) : many_rows(args, num_threads, marks);
}

}  // namespace dtm_fast
