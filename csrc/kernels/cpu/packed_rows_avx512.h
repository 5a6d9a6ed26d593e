// Rows packed for the micro-kernel of gemm_panel_avx512.h, and their products with packed matrices. Included
// only by files compiled for at least AVX-512; everything is in an anonymous namespace, so that no copy can
// reach a file of a lower instruction set.
#pragma once

#include "gemm_panel_avx512.h"

namespace dtm_fast {
namespace {

// Lanes of a panel's row of K elements: whole vectors, so that tails are zeros.
template <typename Lanes>
constexpr int64_t panel_lanes(int64_t K) {
  return (K + 16 * Lanes::kLaneK - 1) / (16 * Lanes::kLaneK) * 16;
}

// Rows of `depth` elements in blocks of at most kMaxRows rows and kGemmBlockK lanes: what the micro-kernel
// multiplies without packing anything.
template <typename LanesOfRows>
class PackedRows {
 public:
  using Lanes = LanesOfRows;
  static constexpr int kPieces = 1;  // of each number
  static constexpr int64_t kBlockRows = kMaxRows;
  // Rows that go through the second half of a decoder layer together: all that they need, some 500 KB, stays
  // in the second-level cache.
  static constexpr int64_t kChunkRows = 96;

  PackedRows(float* data, int64_t rows, int64_t depth)
      : data_(data), rows_(rows), depth_(depth), blocks_((rows + kMaxRows - 1) / kMaxRows) {}

  static int64_t size(int64_t rows, int64_t depth) {
    return (rows + kMaxRows - 1) / kMaxRows * block_size(depth);
  }

  int64_t count() const { return rows_; }
  int64_t depth() const { return depth_; }
  int64_t blocks() const { return blocks_; }
  // Blocks are as even as can be.
  int64_t first_row(int64_t block) const { return block * rows_ / blocks_; }
  const float* block(int64_t b) const { return data_ + b * block_size(depth_); }

  // Of a panel, for each of its columns.
  static int64_t panel_floats(int64_t K) { return panel_lanes<Lanes>(K); }

  // Rows that a product writes.
  static int64_t written_rows(int64_t rows) { return rows; }

  // 32 elements of a row, k being a multiple of 32.
  void store_32(int64_t row, int64_t k, __m512 low, __m512 high) const {
    Lanes::store_32(at(row, k), low, high);
  }

 private:
  float* at(int64_t row, int64_t k) const {
    int64_t b = (row + 1) * blocks_ / rows_;
    while (b >= blocks_ || first_row(b) > row) --b;
    const int64_t lane = k / Lanes::kLaneK;
    return data_ + b * block_size(depth_) + lane / kGemmBlockK * (kMaxRows * kGemmBlockK) +
           (row - first_row(b)) * kGemmBlockK + lane % kGemmBlockK;
  }

  static int64_t block_size(int64_t depth) {
    const int64_t written = (depth + 31) / 32 * 32 / Lanes::kLaneK;  // 32 elements at a time
    return (written + kGemmBlockK - 1) / kGemmBlockK * kGemmBlockK * kMaxRows;
  }

  float* data_;
  int64_t rows_, depth_, blocks_;
};

// c[i, 0 : N] = or += rows[i] @ matrix.T for the row blocks that `wanted` names, c having room for
// rows.written_rows(); `panels` as pack_panel makes them.
template <typename Lanes, typename Wanted>
void multiply_rows(const PackedRows<Lanes>& rows, const float* panels, const float* /*rest*/, int64_t N,
                   bool adds, float* c, int64_t c_stride, const Wanted& wanted) {
  const int64_t all_lanes = panel_lanes<Lanes>(rows.depth());
  for (int64_t j0 = 0; j0 < N; j0 += kPanelCols) {
    const int64_t cols = N - j0 < kPanelCols ? N - j0 : kPanelCols;
    const float* panel = panels + j0 * all_lanes;
    for (int64_t lane = 0; lane < all_lanes; lane += kGemmBlockK) {
      const int64_t lanes = all_lanes - lane < kGemmBlockK ? all_lanes - lane : kGemmBlockK;
      const bool is_first = lane == 0 && !adds;
      for (int64_t b = 0; b < rows.blocks(); ++b) {
        if (!wanted(b)) continue;
        const int64_t i0 = rows.first_row(b), count = rows.first_row(b + 1) - i0;
        kMultiply<Lanes>[count](rows.block(b) + lane* kMaxRows, panel + lane* kPanelCols, lanes, is_first,
                                c + i0* c_stride + j0, c_stride, cols);
      }
    }
  }
}

// 32 or fewer rows of a float32 matrix as a panel; elements are put in by Store.
template <typename Lanes, typename Load>
void pack_panel(int64_t rows, int64_t K, const Load& load, float* panel) {
  for (int64_t k = 0; k < K; k += 16 * Lanes::kLaneK) {
    for (int64_t half = 0; half < kPanelCols; half += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int64_t j = 0; j < 16; ++j) {
        r[j] = half + j < rows ? load(half + j, k) : _mm512_setzero_si512();
      }
      transpose_16x16(r);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        _mm512_storeu_si512(panel + (k / Lanes::kLaneK + i) * kPanelCols + half, r[i]);
      }
    }
  }
}

}  // namespace
}  // namespace dtm_fast
