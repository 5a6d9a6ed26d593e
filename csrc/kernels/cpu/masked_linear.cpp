#include "masked_linear.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "gemm_tile.h"
#include "large_pages.h"
#include "masked_few_tokens.h"
#include "masked_linear_bfloat16.h"
#include "masked_linear_float32.h"
#include "parallel_for.h"
#include "row_marks.h"
#include "scratch_buffer.h"
#include "store_float.h"

namespace dtm_fast {
namespace {

constexpr int64_t kPageBytes = 4096;
constexpr int64_t kPanelCols = 32;  // tiles are cut between panels
// Of the columns of all masks of a tile: their packed panels and their sums share the second-level cache.
constexpr int64_t kTileCols = 384;
constexpr int64_t kTileVariants = 8;
// With fewer tasks than this for each thread, the last ones would keep the others waiting.
constexpr int64_t kTasksPerThread = 6;
// For few tokens: bounds of the sums of several variants.
constexpr int64_t kFewTokensCols = 256;
constexpr int64_t kFewTokensVariants = 64;
// Bounds the memory of the rows that are computed once more.
constexpr int64_t kMostMarkedResults = 8 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// y cut into tiles as even as can be.
class Tiling {
 public:
  Tiling(const MaskedLinear& args, int64_t most_rows, int64_t most_cols, int64_t most_variants,
         int64_t least_tasks)
      : args_(args),
        panels_(ceil_div(args.N, kPanelCols)),
        row_tiles_(ceil_div(args.M, most_rows)),
        variant_tiles_(ceil_div(args.V, most_variants)),
        col_tiles_(ceil_div(panels_, std::max<int64_t>(1, most_cols / kPanelCols))) {
    const int64_t wanted = ceil_div(least_tasks, row_tiles_ * variant_tiles_);
    col_tiles_ = std::min(panels_, std::max(col_tiles_, wanted));
  }

  int64_t tasks() const { return row_tiles_ * col_tiles_ * variant_tiles_; }
  int64_t rows() const { return ceil_div(args_.M, row_tiles_); }
  int64_t cols() const { return ceil_div(panels_, col_tiles_) * kPanelCols; }
  int64_t variants() const { return ceil_div(args_.V, variant_tiles_); }

  // Floats that a tile needs to keep its sums: none where they are the result.
  int64_t sums() const { return sums_in_y() ? 0 : variants() * rows() * cols(); }

  // Calls multiply(tile) for the tile of a task, which finds the sums at the beginning of scratch if it needs
  // them, and stores what comes out in y. Row tiles of the same columns follow each other, so that their
  // weights are read from memory once.
  template <typename Multiply>
  void run(int64_t task, float* scratch, const Multiply& multiply) const {
    const int64_t r = task % row_tiles_, c = task / row_tiles_ % col_tiles_,
                  v = task / row_tiles_ / col_tiles_;
    const int64_t m0 = r * args_.M / row_tiles_, n0 = c * panels_ / col_tiles_ * kPanelCols;
    const int64_t v0 = v * args_.V / variant_tiles_;
    GemmTile tile;
    tile.type = args_.type;
    tile.x = static_cast<const char*>(args_.x) + m0 * args_.x_stride * size_of(args_.type);
    tile.x_stride = args_.x_stride;
    tile.weight = static_cast<const char*>(args_.weight) + n0 * args_.weight_stride * size_of(args_.type);
    tile.weight_stride = args_.weight_stride;
    tile.mask = args_.mask + v0 * args_.mask_variant_stride + n0 * args_.mask_row_stride;
    tile.mask_row_stride = args_.mask_row_stride;
    tile.mask_variant_stride = args_.mask_variant_stride;
    tile.variants = (v + 1) * args_.V / variant_tiles_ - v0;
    tile.rows = (r + 1) * args_.M / row_tiles_ - m0;
    tile.cols = std::min(args_.N, (c + 1) * panels_ / col_tiles_ * kPanelCols) - n0;
    tile.K = args_.K;
    if (sums_in_y()) {
      tile.c = static_cast<float*>(args_.y) + (v0 * args_.M + m0) * args_.N + n0;
      tile.c_stride = args_.N;
      tile.c_variant_stride = args_.M * args_.N;
    } else {
      tile.c = scratch;
      tile.c_stride = cols();
      tile.c_variant_stride = rows() * cols();
    }
    tile.scratch = scratch + sums();
    multiply(tile);
    store(tile, v0, m0, n0);
  }

 private:
  // Sums lie in y unless they would drive each other out of the caches: rows of several variants lie too far
  // apart, and rows that are a multiple of a page apart all use the same few lines of a cache, which costs
  // most where blocks of K follow each other.
  bool sums_in_y() const {
    const bool lines_collide = args_.N * size_of(args_.type) % kPageBytes == 0 && args_.K > kGemmBlockK;
    return args_.type == FloatType::kFloat32 && args_.V == 1 && !(lines_collide && args_.M > kFewTokens);
  }

  void store(const GemmTile& tile, int64_t v0, int64_t m0, int64_t n0) const {
    if (args_.bias == nullptr && sums_in_y()) return;
    for (int64_t v = 0; v < tile.variants; ++v) {
      for (int64_t i = 0; i < tile.rows; ++i) {
        float* row = tile.c + v * tile.c_variant_stride + i * tile.c_stride;
        if (args_.bias != nullptr) {
          for (int64_t j = 0; j < tile.cols; ++j) row[j] += args_.bias[n0 + j];
        }
        if (sums_in_y()) continue;
        store_floats(args_.y, args_.type, ((v0 + v) * args_.M + m0 + i) * args_.N + n0, row, tile.cols);
      }
    }
  }

  const MaskedLinear& args_;
  int64_t panels_, row_tiles_, variant_tiles_, col_tiles_;
};

int64_t least_tasks(int num_threads) { return num_threads > 1 ? kTasksPerThread * num_threads : 1; }

void by_tiles(GemmTileKernel* gemm_tile, const MaskedLinear& args, int num_threads) {
  const int64_t most_cols = kTileCols / std::min(args.V, kTileVariants);
  const Tiling tiling(args, kGemmTileRows, most_cols, kTileVariants, least_tasks(num_threads));
  const int64_t size = tiling.sums() + gemm_tile_scratch(tiling.variants() * tiling.cols());
  ScratchBuffer<float> scratch(threads_used(tiling.tasks(), num_threads), size);
  parallel_for(tiling.tasks(), num_threads,
               [&](int64_t task, int thread) { tiling.run(task, scratch.part(thread), gemm_tile); });
}

void by_few_tokens(CpuIsa isa, const MaskedLinear& args, int num_threads) {
  const bool pairs = isa >= CpuIsa::kAvx512Bf16 && args.type == FloatType::kBfloat16;
  MaskedFewTokens* const multiply = pairs ? masked_few_tokens_avx512_bf16 : masked_few_tokens_avx512;
  FewTokensX* const pack_x = pairs ? few_tokens_x_avx512_bf16 : few_tokens_x_avx512;
  // Nothing is known of memory on other machines with AMX, but on a Xeon of the fourth generation runs took
  // 3.2 ms where the next vectors took 2.7 ms.
  const Fetch fetch = isa == CpuIsa::kAmx             ? Fetch::kNextVectors
                      : fetches_far_to_second_level() ? Fetch::kRunsToSecondLevel
                                                      : Fetch::kRunsToFirstLevel;
  // One variant is read at the pace of memory, best in one run for each thread.
  const bool one_run = args.V == 1 && fetch != Fetch::kNextVectors;
  const Tiling tiling(args, kFewTokens, one_run ? args.N : kFewTokensCols, kFewTokensVariants,
                      one_run ? num_threads : least_tasks(num_threads));
  ScratchBuffer<float> x(1, few_tokens_x_size(args.M, args.K));
  pack_x(args.type, args.x, args.x_stride, args.M, args.K, x.part(0));
  ScratchBuffer<float> scratch(threads_used(tiling.tasks(), num_threads),
                               tiling.sums() + few_tokens_scratch(tiling.variants()));
  parallel_for(tiling.tasks(), num_threads, [&](int64_t task, int thread) {
    tiling.run(task, scratch.part(thread), [&](const GemmTile& tile) { multiply(tile, x.part(0), fetch); });
  });
}

// What is marked, as the next lower instruction set computes it, some rows at a time.
void compute_marked_rows(const MaskedLinear& args, const std::vector<RowMark>& marks, int num_threads) {
  const std::vector<int64_t> rows = marked_rows(marks);
  const int64_t marked = static_cast<int64_t>(rows.size());
  const int64_t most = std::clamp<int64_t>(kMostMarkedResults / (args.V * args.N), 1, args.M);
  for (int64_t first = 0; first < marked; first += most) {
    MaskedLinear part = args;
    part.M = std::min(most, marked - first);
    ScratchBuffer<float> x(1, part.M * args.K), y(1, args.V * part.M * args.N);
    gather_rows(static_cast<const float*>(args.x), args.x_stride, args.K, rows.data() + first, part.M,
                x.part(0));
    part.x = x.part(0);
    part.x_stride = args.K;
    part.y = y.part(0);
    masked_linear(CpuIsa::kAvx512Bf16, part, num_threads);
    for (int64_t each = 0; each < args.V * part.M; ++each) {
      const int64_t v = each / part.M, m = rows[static_cast<size_t>(first + each % part.M)];
      const float* from = y.part(0) + each * args.N;
      float* to = static_cast<float*>(args.y) + (v * args.M + m) * args.N;
      const bool all = marks[static_cast<size_t>(m)] == RowMark::kSmall;
      for (int64_t n = 0; n < args.N; ++n) to[n] = all || !std::isfinite(to[n]) ? from[n] : to[n];
    }
  }
}

}  // namespace

void masked_linear(CpuIsa isa, const MaskedLinear& args, int num_threads) {
  require_cpu_isa(isa);
  if (args.V == 0 || args.M == 0 || args.N == 0) return;
  populate_large_pages(args.y, args.V * args.M * args.N * size_of(args.type), num_threads);
  if (isa == CpuIsa::kAmx && args.type == FloatType::kBfloat16) {
    return masked_linear_bfloat16(args, num_threads);
  }
  if (isa == CpuIsa::kAmx) {
    std::vector<RowMark> marks =
        mark_small_rows_amx(static_cast<const float*>(args.x), args.x_stride, args.M, args.K, num_threads);
    masked_linear_float32(args, num_threads, marks.data());
    return compute_marked_rows(args, marks, num_threads);
  }
  GemmTileKernel* const gemm_tile = gemm_tile_kernel(isa, args.type);
  if (isa >= CpuIsa::kAvx512 && args.M <= kFewTokens) {
    by_few_tokens(isa, args, num_threads);
  } else {
    by_tiles(gemm_tile, args, num_threads);
  }
}

}  // namespace dtm_fast
