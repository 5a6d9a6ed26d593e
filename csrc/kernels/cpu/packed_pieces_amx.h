// Rows of float32 packed in pieces of bfloat16, and their products with packed matrices on AMX, in the order
// of float32_pieces.h: what packed_rows_avx512.h is without it. Matrices are packed as they are there, and
// split into pieces while others are multiplied. Included only by files compiled for AMX; everything is in an
// anonymous namespace, so that no copy can reach a file of a lower instruction set.
#pragma once

#include "float32_steps_amx.h"
#include "packed_rows_avx512.h"

namespace dtm_fast {
namespace {

constexpr int64_t kTileCols = 16;
constexpr int64_t kPiecesOfStep = kFloat32Pieces * 2 * kTileWords;  // of a panel
// Of a panel in a step: both halves of 32 elements, each of one pair for 16 columns.
constexpr int64_t kSplitsOfStep = 2 * kTileCols;

// Rows of `depth` elements, block of K by block, each in groups of 16 rows:
// [steps][kFloat32Pieces][16 rows][16 pairs][2]. Rows that the last group has beyond are never written: what
// they hold reaches no other row.
class PackedPieces {
 public:
  using Lanes = FloatLanes;
  static constexpr int kPieces = kFloat32Pieces;
  static constexpr int64_t kBlockRows = 2 * kBfloat16Group;
  // As in packed_rows_avx512.h, but every panel is split for as many rows as the second-level cache (2 MiB)
  // has room for.
  static constexpr int64_t kChunkRows = 208;

  PackedPieces(float* data, int64_t rows, int64_t depth)
      : all_(line_after(data)),
        of_eight_(all_ + panel_sums(rows)),
        words_(reinterpret_cast<uint16_t*>(of_eight_ + panel_sums(rows))),
        rows_(rows),
        blocks_of_depth_(depth),
        depth_(depth) {}

  // In floats: the pieces, and the sums of one panel.
  static int64_t size(int64_t rows, int64_t depth) {
    return 16 + 2 * panel_sums(rows) + groups_of(rows) * piece_group_size(depth) / 2;
  }
  static int64_t panel_floats(int64_t K) { return panel_lanes<FloatLanes>(K); }

  int64_t count() const { return rows_; }
  int64_t depth() const { return depth_; }
  const PieceBlocks& blocks_of_depth() const { return blocks_of_depth_; }
  int64_t blocks() const { return (rows_ + kBlockRows - 1) / kBlockRows; }
  int64_t first_row(int64_t block) const { return block * kBlockRows < rows_ ? block * kBlockRows : rows_; }
  int64_t groups(int64_t block) const { return groups_of(rows_ - block * kBlockRows) == 1 ? 1 : 2; }

  // The first group of a block of rows in the block of K from k0 on; the second follows.
  const uint16_t* block(int64_t b, int64_t k0) const { return group(2 * b, k0); }

  // Those of a block of rows with one panel, of 16 rows with 16 columns after the other.
  float* all_sums(int64_t b) const { return all_ + b * kBlockRows * kPanelCols; }
  float* sums_of_eight(int64_t b) const { return of_eight_ + b * kBlockRows * kPanelCols; }

  // Rows that a product writes.
  static int64_t written_rows(int64_t rows) { return rows; }

  // 32 elements of a row, k being a multiple of 32.
  void store_32(int64_t row, int64_t k, __m512 low, __m512 high) const {
    const int64_t k0 = blocks_of_depth_.start(k);
    uint16_t* to = group(row / kBfloat16Group, k0) + (k - k0) / kBfloat16Step * kStepOfX +
                   row % kBfloat16Group * kBfloat16Step;
    Float32Pieces pieces;
    split_x(low, pieces.low);
    split_x(high, pieces.high);
#pragma GCC unroll 3
    for (int p = 0; p < kFloat32Pieces; ++p) {
      _mm512_store_si512(to + p * kTileWords, pairs_of(pieces, p, ~__mmask32{0}));
    }
  }

 private:
  static float* line_after(float* data) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(data) + 63) / 64 * 64);
  }
  static int64_t groups_of(int64_t rows) { return (rows + kBfloat16Group - 1) / kBfloat16Group; }
  static int64_t panel_sums(int64_t rows) { return groups_of(rows) * kBfloat16Group * kPanelCols; }

  uint16_t* group(int64_t g, int64_t k0) const {
    return words_ + groups_of(rows_) * piece_group_size(k0) +
           g * piece_group_size(blocks_of_depth_.depth(k0));
  }

  float *all_, *of_eight_;
  uint16_t* words_;
  int64_t rows_;
  PieceBlocks blocks_of_depth_;
  int64_t depth_;
};

// Splits a block of K of a panel [lanes of K, 32] into pieces, part by part:
// to [steps][kFloat32Pieces][2 halves of the columns][16 pairs][16 columns][2].
class PanelSplit {
 public:
  // Lanes k0 .. k0 + depth - 1 of the panel, which has `lanes` in all. Asks the second-level cache for what
  // lies as far behind.
  PanelSplit(const float* panel, int64_t k0, int64_t depth, int64_t lanes, uint16_t* to)
      : panel_(panel + k0 * kPanelCols),
        lanes_(lanes - k0),
        to_(to),
        end_((depth + kBfloat16Step - 1) / kBfloat16Step * kSplitsOfStep) {}

  DTM_FAST_INLINE void split(int64_t count) {
    for (; count > 0 && next_ < end_; --count) split_one(next_++);
  }

 private:
  DTM_FAST_INLINE void split_one(int64_t index) {
    constexpr int64_t kAhead = kLongestPieceBlock * kPanelCols;
    const int64_t step = index / kSplitsOfStep, pair = index % kSplitsOfStep / 2, half = index % 2;
    const int64_t k = step * kBfloat16Step + pair;
    const float* const from = panel_ + k * kPanelCols + half * kTileCols;
    const bool has_second = k + kTileCols < lanes_;
    const __m512 second = has_second ? _mm512_loadu_ps(from + kTileCols * kPanelCols) : _mm512_setzero_ps();
    _mm_prefetch(reinterpret_cast<const char*>(from + kAhead), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(from + kAhead + kTileCols * kPanelCols), _MM_HINT_T1);
    const Float32Pieces pieces = split_weights(_mm512_loadu_ps(from), second);
    uint16_t* const to = to_ + step * kPiecesOfStep + half * kTileWords + pair * kBfloat16Step;
#pragma GCC unroll 3
    for (int p = 0; p < kFloat32Pieces; ++p) {
      _mm512_store_si512(to + p * 2 * kTileWords, pairs_of(pieces, p, ~__mmask32{0}));
    }
  }

  const float* panel_;
  int64_t lanes_;
  uint16_t* to_;
  int64_t next_ = 0, end_;
};

// Product p of a step: tiles 0 and 1 += 16 rows @ both halves of the columns, tiles 2 and 3 the same with the
// next group of rows. To be called for all p in turn: pieces that two products share stay in their tiles.
template <int kGroups>
DTM_FAST_INLINE void add_rows_product(int p, const uint16_t* rows, int64_t group_size,
                                      const uint16_t* panel) {
  const bool new_weight = p == 0 || kProductWeight[p] != kProductWeight[p - 1];
  const bool new_rows = p == 0 || kProductX[p] != kProductX[p - 1];
  const uint16_t* weight = panel + kProductWeight[p] * 2 * kTileWords;
  const uint16_t* from = rows + kProductX[p] * kTileWords;
  if (new_rows) _tile_loadd(4, from, kTileRowBytes);
  if (new_weight) _tile_loadd(6, weight, kTileRowBytes);
  _tile_dpbf16ps(0, 4, 6);
  if (new_weight) _tile_loadd(7, weight + kTileWords, kTileRowBytes);
  _tile_dpbf16ps(1, 4, 7);
  if (kGroups == 1) return;
  if (new_rows) _tile_loadd(5, from + group_size, kTileRowBytes);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// sums [kGroups, 2, 16, 16] = groups of rows @ a panel, over a block of K. With each step a share of what is
// pending is added, and `splits` parts of the next panel are split.
template <int kGroups>
void multiply_rows_block(const uint16_t* rows, int64_t group_size, const uint16_t* panel, int64_t steps,
                         float* sums, const Pending& pending, PanelSplit& next, int64_t splits) {
  constexpr int64_t kShare = kGroupSums / 2;
  int64_t added = 0;
  finish_writes(panel);
  zero_sums();
  for (int64_t s = 0; s < steps; ++s, rows += kStepOfX, panel += kPiecesOfStep) {
#pragma GCC unroll 6
    for (int p = 0; p < kPieceProducts; ++p) add_rows_product<kGroups>(p, rows, group_size, panel);
    next.split(splits);
    if (added == pending.count) continue;
    add(pending, added, added + kShare);
    added += kShare;
  }
  add(pending, added, pending.count);
  store_sums<kGroups>(sums);
}

// c [rows, cols] = sums of a block of rows, cols <= 32
inline void copy_sums(const float* sums, int64_t rows, int64_t cols, float* c, int64_t c_stride) {
  const __mmask16 low = first_lanes(cols), high = cols > 16 ? first_lanes(cols - 16) : __mmask16{0};
  for (int64_t i = 0; i < rows; ++i, c += c_stride) {
    const float* const own = sums + i / kBfloat16Group * 2 * kTileSums + i % kBfloat16Group * kTileCols;
    _mm512_mask_storeu_ps(c, low, _mm512_load_ps(own));
    _mm512_mask_storeu_ps(c + kTileCols, high, _mm512_load_ps(own + kTileSums));
  }
}

// c[i, 0 : N] = rows[i] @ matrix.T for the row blocks that `wanted` names (nothing adds to c in float32);
// `panels` as pack_panel makes them of FloatLanes. The tiles must be in use, denormal numbers zero.
template <typename Wanted>
void multiply_rows(const PackedPieces& rows, const float* panels, const float* /*rest*/, int64_t N,
                   bool /*adds*/, float* c, int64_t c_stride, const Wanted& wanted) {
  alignas(64) uint16_t splits[2][kLongestPieceBlock / kBfloat16Step * kPiecesOfStep];
  alignas(64) float buffers[2][2 * kGroupSums];
  const PieceBlocks& blocks = rows.blocks_of_depth();
  const int64_t lanes = PackedPieces::panel_floats(rows.depth());
  const auto split_of = [&](int64_t j0, int64_t k0, uint16_t* to) {
    return PanelSplit(panels + j0 * lanes, k0, j0 < N ? blocks.depth(k0) : 0, lanes, to);
  };
  split_of(0, 0, splits[0]).split(kSplitsOfStep * kLongestPieceBlock);
  int turn = 0, sums_turn = 0;
  for (int64_t j0 = 0; j0 < N; j0 += kPanelCols) {
    Pending pending;
    for (int64_t k0 = 0; k0 < rows.depth(); k0 = blocks.after(k0), turn = 1 - turn) {
      const int64_t depth = blocks.depth(k0), steps = (depth + kBfloat16Step - 1) / kBfloat16Step;
      const bool last = blocks.is_last(k0);
      PanelSplit next = split_of(last ? j0 + kPanelCols : j0, last ? 0 : blocks.after(k0), splits[1 - turn]);
      const int64_t share = (kSplitsOfStep + rows.blocks() - 1) / rows.blocks();
      for (int64_t b = 0; b < rows.blocks(); ++b) {
        if (!wanted(b)) continue;
        const int64_t groups = rows.groups(b);
        const BlockSums sums = sums_of_block(blocks, k0, groups * kGroupSums, rows.all_sums(b),
                                             rows.sums_of_eight(b), buffers[sums_turn]);
        (groups == 2 ? multiply_rows_block<2> : multiply_rows_block<1>)(rows.block(b, k0),
                                                                        piece_group_size(depth), splits[turn],
                                                                        steps, sums.to, pending, next, share);
        pending = sums.then;
        sums_turn = 1 - sums_turn;
      }
      next.split(kSplitsOfStep * kLongestPieceBlock);
    }
    add(pending, 0, pending.count);
    const int64_t cols = N - j0 < kPanelCols ? N - j0 : kPanelCols;
    for (int64_t b = 0; b < rows.blocks(); ++b) {
      if (!wanted(b)) continue;
      copy_sums(rows.all_sums(b), rows.first_row(b + 1) - rows.first_row(b), cols,
                c + rows.first_row(b) * c_stride + j0, c_stride);
    }
  }
}

}  // namespace
}  // namespace dtm_fast
