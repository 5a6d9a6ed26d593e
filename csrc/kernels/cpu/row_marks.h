// Rows of x that must not be multiplied in pieces, see float32_pieces.h: what is to be known of them, and
// getting hold of them.
#pragma once

#include <cstdint>
#include <vector>

namespace dtm_fast {

// What the pieces cannot tell of a row of x.
enum class RowMark : uint8_t {
  kNone,
  kNotFinite,  // some of its results are not finite: they may be other ones, or only too large for a piece
  kSmall,      // its largest number is below kSmallRow: too much of it could be below 2^-126
};
constexpr float kSmallRow = 0x1p-60f;

// Of x [M, K] of row stride x_stride: kSmall or kNone.
std::vector<RowMark> mark_small_rows_amx(const float* x, int64_t x_stride, int64_t M, int64_t K,
                                         int num_threads);

// The rows that have marks, ascending.
std::vector<int64_t> marked_rows(const std::vector<RowMark>& marks);

// to [count, K] = the given rows of x
void gather_rows(const float* x, int64_t x_stride, int64_t K, const int64_t* rows, int64_t count, float* to);

}  // namespace dtm_fast
