#include "token_divergence.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "gemm_tile.h"
#include "parallel_for.h"
#include "scratch_buffer.h"
#include "store_float.h"

namespace dtm_fast {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows whose summaries are held at a time: 4 row tiles, about 3 MB for a vocabulary of 50,000.
constexpr int64_t kChunkRows = 4 * kGemmTileRows;

// The logits of a row so far, tiles being added in the order of the vocabulary. Double precision, because it
// costs nothing here and leaves the sum over thousands of tiles as exact as the tiles.
class RowSummary {
 public:
  void add(const LogitSummary& tile, int64_t first_token) {
    if (std::isnan(max_)) return;
    if (std::isnan(tile.max) || tile.max > max_ || argmax_ < 0) {
      // exp(-infinity) = 0 drops what came before where that was -infinity or nothing.
      if (std::isfinite(tile.max))
        sum_ = sum_ * std::exp(max_ - static_cast<double>(tile.max)) + tile.sum_exp;
      max_ = tile.max;
      argmax_ = first_token + tile.argmax;
    } else if (std::isfinite(max_) && tile.max > -kInfinity) {
      sum_ += tile.sum_exp * std::exp(static_cast<double>(tile.max) - max_);
    }
  }

  int64_t argmax() const { return argmax_; }

  // As torch.logsumexp: infinite (or NaN) exactly where the largest logit is.
  double log_sum_exp() const { return std::isfinite(max_) ? max_ + std::log(sum_) : max_; }

 private:
  double max_ = -kInfinity;
  double sum_ = 0.0;
  int64_t argmax_ = -1;
};

// Rounds the logits to bfloat16 if that is what the model computes in, and fills the row up.
void finish_logits(FloatType type, float* row, int64_t cols, int64_t padded_cols) {
  if (type == FloatType::kBfloat16) {
    for (int64_t j = 0; j < cols; ++j) row[j] = float_from_bfloat16(bfloat16_bits(row[j]));
  }
  for (int64_t j = cols; j < padded_cols; ++j) row[j] = -kInfinity;
}

// Rows t0 .. t0 + rows - 1, rows <= kChunkRows.
void token_divergence_chunk(CpuIsa isa, const TokenDivergence& args, int64_t t0, int64_t rows,
                            int num_threads) {
  GemmTileKernel* const gemm_tile = gemm_tile_kernel(isa);
  SummarizeLogits* const summarize = isa >= CpuIsa::kAvx512 ? summarize_logits_avx512 : summarize_logits_avx2;
  const int64_t row_tiles = (rows + kGemmTileRows - 1) / kGemmTileRows;
  const int64_t col_tiles = (args.V + kVocabularyTile - 1) / kVocabularyTile;
  const int64_t tasks = row_tiles * col_tiles;
  const int64_t tile_rows = std::min(kGemmTileRows, rows);
  const int64_t c_size = tile_rows * kVocabularyTile;
  ScratchBuffer<float> scratch(threads_used(tasks, num_threads), c_size + gemm_tile_scratch(tile_rows));
  ScratchBuffer<LogitSummary> summaries(1, rows * col_tiles);
  ScratchBuffer<float> reference_logits(1, rows);
  parallel_for(tasks, num_threads, [&](int64_t task, int thread) {
    // Row tiles of one vocabulary tile follow each other, so that its weights are read from memory once.
    const int64_t i0 = task % row_tiles * kGemmTileRows;
    const int64_t v0 = task / row_tiles * kVocabularyTile;
    GemmTile tile = {};
    tile.type = args.type;
    tile.x = static_cast<const char*>(args.hidden) + (t0 + i0) * args.hidden_stride * size_of(args.type);
    tile.x_stride = args.hidden_stride;
    tile.weight = static_cast<const char*>(args.lm_head) + v0 * args.lm_head_stride * size_of(args.type);
    tile.weight_stride = args.lm_head_stride;
    tile.variants = 1;
    tile.rows = std::min(kGemmTileRows, rows - i0);
    tile.cols = std::min(kVocabularyTile, args.V - v0);
    tile.K = args.D;
    tile.c = scratch.part(thread);
    tile.c_stride = kVocabularyTile;
    tile.scratch = tile.c + c_size;
    gemm_tile(tile);
    const int64_t padded_cols = (tile.cols + 15) / 16 * 16;
    for (int64_t i = 0; i < tile.rows; ++i) {
      float* row = tile.c + i * tile.c_stride;
      finish_logits(args.type, row, tile.cols, padded_cols);
      summaries.part(0)[(i0 + i) * col_tiles + v0 / kVocabularyTile] = summarize(row, padded_cols);
      const int64_t reference = args.reference[t0 + i0 + i] - v0;
      if (reference >= 0 && reference < tile.cols) reference_logits.part(0)[i0 + i] = row[reference];
    }
  });
  for (int64_t i = 0; i < rows; ++i) {
    RowSummary row;
    for (int64_t c = 0; c < col_tiles; ++c)
      row.add(summaries.part(0)[i * col_tiles + c], c * kVocabularyTile);
    args.mismatch[t0 + i] = row.argmax() != args.reference[t0 + i];
    args.nll[t0 + i] = static_cast<float>(row.log_sum_exp() - reference_logits.part(0)[i]);
  }
}

}  // namespace

void token_divergence(CpuIsa isa, const TokenDivergence& args, int num_threads) {
  require_cpu_isa(isa);
  for (int64_t t0 = 0; t0 < args.T; t0 += kChunkRows) {
    token_divergence_chunk(isa, args, t0, std::min(kChunkRows, args.T - t0), num_threads);
  }
}

}  // namespace dtm_fast
