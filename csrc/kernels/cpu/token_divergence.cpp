#include "token_divergence.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "bfloat16_tiles.h"
#include "float32_pieces.h"
#include "gemm_tile.h"
#include "parallel_for.h"
#include "row_marks.h"
#include "scratch_buffer.h"

namespace dtm_fast {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows whose summaries are held at a time: about 2 MB for a vocabulary of 50,000. With wide tiles, as many as
// share one reading of lm_head; pieces take three times the memory and six times the products.
constexpr int64_t kChunkRows = 3 * kGemmTileRows;
constexpr int64_t kBfloat16ChunkRows = 4 * kWideTileRows;
constexpr int64_t kPiecesChunkRows = 2 * kWideTileRows;
// Rows that are computed once more, at a time.
constexpr int64_t kMarkedRows = 256;

// What the tiles of the vocabulary say of `rows` rows.
class Summaries {
 public:
  Summaries(const TokenDivergence& args, int64_t tile_tokens, int64_t rows)
      : tile_tokens_(tile_tokens),
        tiles_((args.V + tile_tokens - 1) / tile_tokens),
        max_(tiles_, rows),
        sum_exp_(tiles_, rows),
        reference_logit_(1, rows),
        reference_leads_(1, rows) {}

  int64_t tiles() const { return tiles_; }
  float* max(int64_t tile) { return max_.part(tile); }
  float* sum_exp(int64_t tile) { return sum_exp_.part(tile); }
  float* reference_logit() { return reference_logit_.part(0); }
  // Whether no token before the reference in its tile has a logit as large.
  uint8_t* reference_leads() { return reference_leads_.part(0); }

  // Results of row t of args from row i, tiles being added in the order of the vocabulary. Double precision,
  // because it costs little here and leaves the sum over many tiles as exact as the tiles. False if a tile
  // says that its largest logit is NaN.
  bool finish(const TokenDivergence& args, int64_t t, int64_t i) {
    int64_t winner = 0;  // the first tile that holds the largest logit
    for (int64_t tile = 1; tile < tiles_ && !std::isnan(max(winner)[i]); ++tile) {
      if (std::isnan(max(tile)[i]) || max(tile)[i] > max(winner)[i]) winner = tile;
    }
    const float largest = max(winner)[i];
    const float logit = reference_logit()[i];
    const bool is_largest = std::isnan(largest) ? std::isnan(logit) : logit == largest;
    args.mismatch[t] =
        !(winner == args.reference[t] / tile_tokens_ && is_largest && reference_leads()[i] != 0);
    // As torch.logsumexp: infinite (or NaN) exactly where the largest logit is.
    double log_sum_exp = largest;
    if (std::isfinite(largest)) {
      double sum = 0.0;
      for (int64_t tile = 0; tile < tiles_; ++tile) {
        if (max(tile)[i] == -kInfinity) continue;
        sum += sum_exp(tile)[i] * std::exp(static_cast<double>(max(tile)[i]) - largest);
      }
      log_sum_exp += std::log(sum);
    }
    args.nll[t] = static_cast<float>(log_sum_exp - logit);
    return !std::isnan(largest);
  }

 private:
  int64_t tile_tokens_, tiles_;
  ScratchBuffer<float> max_, sum_exp_, reference_logit_;
  ScratchBuffer<uint8_t> reference_leads_;
};

// Rows t0 .. t0 + rows - 1, rows <= kChunkRows.
void summarize_chunk(CpuIsa isa, const TokenDivergence& args, int64_t t0, int64_t rows, int num_threads,
                     Summaries& summaries) {
  GemmTileKernel* const gemm_tile = gemm_tile_kernel(isa, args.type);
  const bool avx512 = isa >= CpuIsa::kAvx512;
  SummarizeLogits* const summarize = avx512 ? summarize_logits_avx512 : summarize_logits_avx2;
  RoundLogits* const round = avx512 ? round_logits_avx512 : round_logits_avx2;
  const int64_t row_tiles = (rows + kGemmTileRows - 1) / kGemmTileRows;
  const int64_t tasks = row_tiles * summaries.tiles();
  const int64_t tile_rows = (rows + row_tiles - 1) / row_tiles;
  const int64_t c_size = tile_rows * kVocabularyTile;
  ScratchBuffer<float> scratch(threads_used(tasks, num_threads), c_size + gemm_tile_scratch(kVocabularyTile));
  parallel_for(tasks, num_threads, [&](int64_t task, int thread) {
    // Row tiles of one vocabulary tile follow each other, so that its weights are read from memory once.
    const int64_t i0 = task % row_tiles * tile_rows;
    const int64_t v0 = task / row_tiles * kVocabularyTile;
    GemmTile tile = {};
    tile.type = args.type;
    tile.x = static_cast<const char*>(args.hidden) + (t0 + i0) * args.hidden_stride * size_of(args.type);
    tile.x_stride = args.hidden_stride;
    tile.weight = static_cast<const char*>(args.lm_head) + v0 * args.lm_head_stride * size_of(args.type);
    tile.weight_stride = args.lm_head_stride;
    tile.variants = 1;
    tile.rows = std::min(tile_rows, rows - i0);
    tile.cols = std::min(kVocabularyTile, args.V - v0);
    tile.K = args.D;
    tile.c = scratch.part(thread);
    tile.c_stride = kVocabularyTile;
    tile.scratch = tile.c + c_size;
    gemm_tile(tile);
    const int64_t padded_cols = (tile.cols + 15) / 16 * 16;
    for (int64_t i = 0; i < tile.rows; ++i) {
      float* row = tile.c + i * tile.c_stride;
      std::fill(row + tile.cols, row + padded_cols, -kInfinity);
      if (args.type == FloatType::kBfloat16) round(row, padded_cols);
      const LogitSummary summary = summarize(row, padded_cols);
      summaries.max(v0 / kVocabularyTile)[i0 + i] = summary.max;
      summaries.sum_exp(v0 / kVocabularyTile)[i0 + i] = summary.sum_exp;
      const int64_t reference = args.reference[t0 + i0 + i] - v0;
      if (reference >= 0 && reference < tile.cols) {
        summaries.reference_logit()[i0 + i] = row[reference];
        summaries.reference_leads()[i0 + i] = summary.argmax == reference;
      }
    }
  });
}

// Rows t0 .. t0 + rows - 1 of hidden, packed for wide tiles.
class PackedHidden {
 public:
  PackedHidden(const TokenDivergence& args, int64_t t0, int64_t rows, int num_threads)
      : args_(args),
        t0_(t0),
        rows_(rows),
        group_size_(is_float32() ? piece_group_size(args.D) : bfloat16_group_size(args.D)),
        groups_((rows + kBfloat16Group - 1) / kBfloat16Group),
        packed_(1, groups_ * group_size_) {
    parallel_for(groups_, num_threads,
                 [&](int64_t group, int) { is_float32() ? pack_pieces(group) : pack_bfloat16(group); });
  }

  // Of a wide tile whose first row is t0 + i.
  uint16_t* tile(int64_t i) { return packed_.part(0) + i / kBfloat16Group * group_size_; }

 private:
  bool is_float32() const { return args_.type == FloatType::kFloat32; }
  int64_t rows_of(int64_t group) const { return std::min(kBfloat16Group, rows_ - group * kBfloat16Group); }

  void pack_bfloat16(int64_t group) {
    const int64_t first = t0_ + group * kBfloat16Group;
    pack_bfloat16_group_amx(static_cast<const uint16_t*>(args_.hidden) + first * args_.hidden_stride,
                            args_.hidden_stride, rows_of(group), args_.D,
                            packed_.part(0) + group * group_size_);
  }

  void pack_pieces(int64_t group) {
    constexpr int64_t kTileGroups = kWideTileRows / kBfloat16Group;
    const int64_t in_tile = group % kTileGroups, first_of_tile = group - in_tile;
    const int64_t groups = std::min(kTileGroups, groups_ - first_of_tile);
    const float* rows =
        static_cast<const float*>(args_.hidden) + (t0_ + group * kBfloat16Group) * args_.hidden_stride;
    const PieceBlocks blocks(args_.D);
    for (int64_t k0 = 0; k0 < args_.D; k0 = blocks.after(k0)) {
      const int64_t depth = blocks.depth(k0);
      pack_float32_group_amx(rows + k0, args_.hidden_stride, rows_of(group), depth,
                             tile(first_of_tile * kBfloat16Group) + groups * piece_group_size(k0) +
                                 in_tile * piece_group_size(depth));
    }
  }

  const TokenDivergence& args_;
  const int64_t t0_, rows_, group_size_, groups_;
  ScratchBuffer<uint16_t> packed_;
};

// Rows t0 .. t0 + rows - 1 on AMX.
void summarize_wide_chunk(const TokenDivergence& args, int64_t t0, int64_t rows, int num_threads,
                          Summaries& summaries) {
  PackedHidden hidden(args, t0, rows, num_threads);
  SummarizeWideTile* const summarize =
      args.type == FloatType::kFloat32 ? summarize_float32_tile_amx : summarize_bfloat16_tile_amx;
  const int64_t row_tiles = (rows + kWideTileRows - 1) / kWideTileRows;
  const int64_t tasks = row_tiles * summaries.tiles();
  const bool eights = args.type == FloatType::kFloat32 && !PieceBlocks(args.D).is_one_eight();
  ScratchBuffer<float> sums(threads_used(tasks, num_threads), (eights ? 2 : 1) * kWideTileSums);
  parallel_for(tasks, num_threads, [&](int64_t task, int thread) {
    // Row tiles of one vocabulary tile follow each other, so that its weights are read from memory once.
    const int64_t i0 = task % row_tiles * kWideTileRows;
    const int64_t v0 = task / row_tiles * kWideVocabularyTile;
    WideTile tile;
    tile.hidden = hidden.tile(i0);
    tile.lm_head = static_cast<const char*>(args.lm_head) + v0 * args.lm_head_stride * size_of(args.type);
    tile.lm_head_stride = args.lm_head_stride;
    tile.reference = args.reference + t0 + i0;
    tile.first_token = v0;
    tile.rows = std::min(kWideTileRows, rows - i0);
    tile.tokens = std::min(kWideVocabularyTile, args.V - v0);
    tile.D = args.D;
    tile.max = summaries.max(v0 / kWideVocabularyTile) + i0;
    tile.sum_exp = summaries.sum_exp(v0 / kWideVocabularyTile) + i0;
    tile.reference_logit = summaries.reference_logit() + i0;
    tile.reference_leads = summaries.reference_leads() + i0;
    tile.sums = sums.part(thread);
    tile.of_eight = eights ? tile.sums + kWideTileSums : nullptr;
    summarize(tile);
  });
}

// As the next lower instruction set computes them, some at a time.
void compute_marked_rows(const TokenDivergence& args, const std::vector<RowMark>& marks, int num_threads) {
  const std::vector<int64_t> rows = marked_rows(marks);
  const int64_t marked = static_cast<int64_t>(rows.size());
  for (int64_t first = 0; first < marked; first += kMarkedRows) {
    const int64_t* const own = rows.data() + first;
    TokenDivergence part = args;
    part.T = std::min(kMarkedRows, marked - first);
    ScratchBuffer<float> hidden(1, part.T * args.D), nll(1, part.T);
    ScratchBuffer<int64_t> reference(1, part.T);
    ScratchBuffer<uint8_t> mismatch(1, part.T);
    gather_rows(static_cast<const float*>(args.hidden), args.hidden_stride, args.D, own, part.T,
                hidden.part(0));
    for (int64_t i = 0; i < part.T; ++i) reference.part(0)[i] = args.reference[own[i]];
    part.hidden = hidden.part(0);
    part.hidden_stride = args.D;
    part.reference = reference.part(0);
    part.mismatch = mismatch.part(0);
    part.nll = nll.part(0);
    token_divergence(CpuIsa::kAvx512Bf16, part, num_threads);
    for (int64_t i = 0; i < part.T; ++i) {
      args.mismatch[own[i]] = part.mismatch[i];
      args.nll[own[i]] = part.nll[i];
    }
  }
}

}  // namespace

void token_divergence(CpuIsa isa, const TokenDivergence& args, int num_threads) {
  require_cpu_isa(isa);
  const bool pieces = isa == CpuIsa::kAmx && args.type == FloatType::kFloat32 && args.D > 0;
  const bool wide = pieces || (isa == CpuIsa::kAmx && args.type == FloatType::kBfloat16);
  const int64_t chunk_rows = pieces ? kPiecesChunkRows : wide ? kBfloat16ChunkRows : kChunkRows;
  std::vector<RowMark> marks;
  if (pieces) {
    marks = mark_small_rows_amx(static_cast<const float*>(args.hidden), args.hidden_stride, args.T, args.D,
                                num_threads);
  }
  Summaries summaries(args, wide ? kWideVocabularyTile : kVocabularyTile, std::min(chunk_rows, args.T));
  for (int64_t t0 = 0; t0 < args.T; t0 += chunk_rows) {
    const int64_t rows = std::min(chunk_rows, args.T - t0);
    wide ? summarize_wide_chunk(args, t0, rows, num_threads, summaries)
         : summarize_chunk(isa, args, t0, rows, num_threads, summaries);
    constexpr int64_t kRowsOfTask = 16;  // neighbours share cache lines
    parallel_for((rows + kRowsOfTask - 1) / kRowsOfTask, num_threads, [&](int64_t task, int) {
      for (int64_t i = task * kRowsOfTask; i < rows && i < (task + 1) * kRowsOfTask; ++i) {
        const bool known = summaries.finish(args, t0 + i, i);
        if (pieces && !known) marks[static_cast<size_t>(t0 + i)] = RowMark::kNotFinite;
      }
    });
  }
  compute_marked_rows(args, marks, num_threads);
}

}  // namespace dtm_fast
