// Rows packed as tiles of bfloat16, and their products with packed matrices on AMX: what packed_rows_avx512.h
// is without it. Included only by files compiled for AMX; everything is in an anonymous namespace, so that no
// copy can reach a file of a lower instruction set.
//
// A number may be the sum of two pieces: its nearest bfloat16 and the nearest of what is left, together 16
// bits. Of the products of such numbers, that of the two second pieces is left out (Henry, Tang and Heinecke,
// "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", ARITH 2019).
#pragma once

#include "amx_tiles.h"
#include "packed_rows_avx512.h"
#include "pair_lanes_avx512_bf16.h"

namespace dtm_fast {
namespace {

constexpr int64_t kTileFloats = kTileBytes / sizeof(float);
constexpr int64_t kStepPanel = kTileRows * kPanelCols;  // floats of a panel in a step of 32 elements

// The nearest bfloat16 of each value, taken away from it. Nothing is left of a value that is not finite, or
// its pieces would not add up to it but to NaN.
DTM_FAST_INLINE __m512i take_piece(__m512* low, __m512* high) {
  constexpr int kNotFinite = 0x99;  // infinities, and both kinds of NaN
  const __m512i pairs = PairLanes::pairs(*low, *high);
  const auto rest = [](__m512 value, __m512i words) {
    const __m512 piece = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    return _mm512_maskz_sub_ps(_knot_mask16(_mm512_fpclass_ps_mask(piece, kNotFinite)), value, piece);
  };
  *low = rest(*low, _mm512_cvtepu16_epi32(_mm512_castsi512_si256(pairs)));
  *high = rest(*high, _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(pairs, 1)));
  return pairs;
}

// to [rows, cols] = from, cols <= 32
inline void copy_block(const float* from, int64_t from_stride, int64_t rows, int64_t cols, float* to,
                       int64_t to_stride) {
  const __mmask16 low = first_lanes(cols), high = cols > 16 ? first_lanes(cols - 16) : __mmask16{0};
  for (int64_t i = 0; i < rows; ++i, from += from_stride, to += to_stride) {
    _mm512_mask_storeu_ps(to, low, _mm512_maskz_loadu_ps(low, from));
    _mm512_mask_storeu_ps(to + 16, high, _mm512_maskz_loadu_ps(high, from + 16));
  }
}

// Rows of `depth` elements in blocks of two tiles; the last block has one if it has no more rows. A block
// holds one step of 32 elements after the other. Rows that a tile has beyond the last are never written: what
// they hold reaches no other row.
template <int kPiecesOfNumber>
class PackedTiles {
 public:
  using Lanes = PairLanes;
  static constexpr int kPieces = kPiecesOfNumber;
  static constexpr int64_t kBlockRows = 2 * kTileRows;
  // As in packed_rows_avx512.h, but weights take longer to come than to be multiplied, and what has AMX has a
  // second-level cache of 2 MiB.
  static constexpr int64_t kChunkRows = 208;

  PackedTiles(float* data, int64_t rows, int64_t depth) : data_(data), rows_(rows), depth_(depth) {}

  static int64_t size(int64_t rows, int64_t depth) { return kPieces * piece_size(rows, depth); }
  static int64_t panel_floats(int64_t K) { return panel_lanes<PairLanes>(K); }

  int64_t count() const { return rows_; }
  int64_t depth() const { return depth_; }
  int64_t steps() const { return steps_of(depth_); }
  int64_t blocks() const { return (rows_ + kBlockRows - 1) / kBlockRows; }
  int64_t first_row(int64_t block) const { return block * kBlockRows < rows_ ? block * kBlockRows : rows_; }
  int64_t tiles(int64_t block) const { return tiles_of(rows_ - block * kBlockRows) == 1 ? 1 : 2; }
  const float* block(int piece, int64_t b) const {
    return data_ + piece * piece_size(rows_, depth_) + 2 * b * steps() * kTileFloats;
  }

  // Rows that a product writes, the last ones of no use.
  static int64_t written_rows(int64_t rows) { return tiles_of(rows) * kTileRows; }

  // 32 elements of a row, k being a multiple of 32.
  void store_32(int64_t row, int64_t k, __m512 low, __m512 high) const {
    float* to = at(row, k);
    for (int piece = 0; piece < kPieces - 1; ++piece, to += piece_size(rows_, depth_)) {
      _mm512_storeu_si512(to, take_piece(&low, &high));
    }
    _mm512_storeu_si512(to, PairLanes::pairs(low, high));
  }

 private:
  float* at(int64_t row, int64_t k) const {
    const int64_t b = row / kBlockRows, i = row % kBlockRows;
    return data_ + (2 * b * steps() + k / 32 * tiles(b)) * kTileFloats + i * kTileRowBytes / sizeof(float);
  }
  static int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
  static int64_t steps_of(int64_t depth) { return (depth + 31) / 32; }
  static int64_t piece_size(int64_t rows, int64_t depth) {
    return tiles_of(rows) * steps_of(depth) * kTileFloats;
  }

  float* data_;
  int64_t rows_, depth_;
};

// Tiles 0 .. 3 += kTiles tiles of rows @ a panel, over `steps` steps. Asks the second-level cache for `lines`
// cache lines of each step at `ahead`. The panel fills the first-level cache, so rows are loaded with the
// hint that they will not be needed soon (TILELOADDT1, Intel SDM vol. 2).
template <int kTiles>
DTM_FAST_INLINE void add_tiles(const float* rows, const float* panel, int64_t steps, const float* ahead,
                               int64_t lines) {
  constexpr int64_t kPanelBytes = kPanelCols * sizeof(float);
  for (int64_t s = 0; s < steps; ++s) {
    for (int64_t i = 0; i < lines; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead + 16 * i), _MM_HINT_T1);
    }
    _tile_stream_loadd(4, rows, kTileRowBytes);
    _tile_loadd(6, panel, kPanelBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + kPanelCols / 2, kPanelBytes);
    _tile_dpbf16ps(1, 4, 7);
    if (kTiles == 2) {
      _tile_stream_loadd(5, rows + kTileFloats, kTileRowBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    rows += kTiles * kTileFloats;
    panel += kStepPanel;
    ahead += kStepPanel;
  }
}

// Tiles 0 .. 3 = c [16 * kTiles, 32], or zeros
template <int kTiles>
DTM_FAST_INLINE void load_sums(const float* c, int64_t c_stride, bool zeros) {
  if (zeros) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  const int64_t bytes = c_stride * static_cast<int64_t>(sizeof(float));
  finish_writes(c);
  _tile_loadd(0, c, bytes);
  _tile_loadd(1, c + kTileRows, bytes);
  if (kTiles == 2) _tile_loadd(2, c + kTileRows * c_stride, bytes);
  if (kTiles == 2) _tile_loadd(3, c + kTileRows * c_stride + kTileRows, bytes);
}

// c = tiles 0 .. 3
template <int kTiles>
DTM_FAST_INLINE void store_sums(float* c, int64_t c_stride) {
  const int64_t bytes = c_stride * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + kTileRows, bytes);
  if (kTiles == 2) _tile_stored(2, c + kTileRows * c_stride, bytes);
  if (kTiles == 2) _tile_stored(3, c + kTileRows * c_stride + kTileRows, bytes);
  finish_writes(c);
}

// Steps of a panel that stay in the first-level cache (36 KiB) while rows pass by: as few blocks of them as
// possible, as even as can be.
inline int64_t steps_of_block(int64_t steps, int pieces) {
  const int64_t most = 18 / pieces, blocks = steps <= most ? 1 : (steps + most - 1) / most;
  return (steps + blocks - 1) / blocks;
}

// c [16 * kTiles, 32] = or += block b of rows @ a panel, whose pieces begin at `panel`; both from step s0 on
template <int kTiles, int kPieces>
void multiply_block(const PackedTiles<kPieces>& rows, int64_t b, const float* const (&panel)[2], int64_t s0,
                    int64_t steps, float* c, int64_t c_stride, bool adds) {
  // Every block asks for its share of what follows the panel's steps.
  const int64_t line0 = b * 32 / rows.blocks(), lines = (b + 1) * 32 / rows.blocks() - line0;
  load_sums<kTiles>(c, c_stride, !adds);
  finish_writes(rows.block(0, b));
  for (int places = kPieces - 1; places >= 0; --places) {  // the small ones first
    for (int piece = 0; piece <= places; ++piece) {
      const float* x = rows.block(piece, b) + s0 * kTiles * kTileFloats;
      const float* w = panel[places - piece] + s0 * kStepPanel;
      add_tiles<kTiles>(x, w, steps, w + steps * kStepPanel + 16 * line0, piece == 0 ? lines : 0);
    }
  }
  store_sums<kTiles>(c, c_stride);
}

// c[i, 0 : N] = or += rows[i] @ matrix.T for the row blocks that `wanted` names, c having room for
// rows.written_rows(); `panels` as pack_panel makes them of pairs, `rest` of the second pieces, if there are
// two. The tiles must be in use.
template <int kPieces, typename Wanted>
void multiply_rows(const PackedTiles<kPieces>& rows, const float* panels, const float* rest, int64_t N,
                   bool adds, float* c, int64_t c_stride, const Wanted& wanted) {
  alignas(64) float narrow[PackedTiles<kPieces>::kBlockRows * kPanelCols];  // what would be wider than c
  const int64_t most = steps_of_block(rows.steps(), kPieces);
  for (int64_t j0 = 0; j0 < N; j0 += kPanelCols) {
    const int64_t cols = N - j0 < kPanelCols ? N - j0 : kPanelCols;
    const int64_t at = j0 * PackedTiles<kPieces>::panel_floats(rows.depth());
    const float* const panel[2] = {panels + at, kPieces == 2 ? rest + at : nullptr};
    for (int64_t s0 = 0; s0 < rows.steps(); s0 += most) {
      const int64_t steps = rows.steps() - s0 < most ? rows.steps() - s0 : most;
      for (int64_t b = 0; b < rows.blocks(); ++b) {
        if (!wanted(b)) continue;
        float* const own = c + rows.first_row(b) * c_stride + j0;
        const int64_t count = rows.first_row(b + 1) - rows.first_row(b);
        const bool fits = cols == kPanelCols, adds_here = adds || s0 > 0;
        if (!fits && adds_here) copy_block(own, c_stride, count, cols, narrow, kPanelCols);
        float* const to = fits ? own : narrow;
        const int64_t stride = fits ? c_stride : kPanelCols;
        if (rows.tiles(b) == 2) {
          multiply_block<2>(rows, b, panel, s0, steps, to, stride, adds_here);
        } else {
          multiply_block<1>(rows, b, panel, s0, steps, to, stride, adds_here);
        }
        if (!fits) copy_block(narrow, kPanelCols, count, cols, own, c_stride);
      }
    }
  }
}

}  // namespace
}  // namespace dtm_fast
