// Float32 products on AMX tiles, which multiply bfloat16: the order of their sums, and how x is packed for
// them.
//
// A number is the sum of three of bfloat16 (Henry, Tang, Heinecke, "Leveraging the bfloat16 Artificial
// Intelligence Datatype For Higher-Precision Computations", ARITH 2019), x = x0 + x1 + x2: x0 is x rounded to
// nearest, halves away from zero, for weights cut off, x1 what is left, cut off, x2 what is left then, all of
// it. A step of 32 of K adds six products to a sum,
//
//   x0 w2, x0 w1, x1 w1, x1 w0, x0 w0, x2 w0
//
// in this order, each as in bfloat16_tiles.h but for its pairs: "even" are the first 16 of K, "odd" the
// last 16. Left out are x1 w2, x2 w1 and x2 w2, in all hardly more than 2^-21 |x w| and usually far less, for
// x1 has either sign. K is cut into blocks, which are summed from zero; the sums of eight blocks are added in
// order, and those of the eights in order. So there is less rounding than with one fused multiply-add after
// the other: a third of the error of torch's product, measured from 576 to 11,008 terms, and where all have
// the same sign a third to four fifths.
//
// Denormal numbers, pieces and results are taken as zero everywhere, so that numbers below 2^-102 lose
// digits. What is not finite has no pieces: row_marks.h tells what is done with it.
#pragma once

#include <cstdint>

#include "bfloat16_tiles.h"

namespace dtm_fast {

constexpr int kFloat32Pieces = 3;
// A block of K, with the pieces of 32 weight rows, shares the first-level cache with two groups of x.
constexpr int64_t kLongestPieceBlock = 128;
constexpr int64_t kPieceBlocksAdded = 8;  // in order, before their sum is added to the others

// The blocks of K, each named by where it starts.
class PieceBlocks {
 public:
  explicit constexpr PieceBlocks(int64_t K)
      : K_(K), most_depth_(bfloat16_block_depth(K, kLongestPieceBlock)) {}

  int64_t start(int64_t k) const { return k / most_depth_ * most_depth_; }
  int64_t after(int64_t k0) const { return k0 + most_depth_; }
  int64_t depth(int64_t k0) const { return is_last(k0) ? K_ - k0 : most_depth_; }
  bool is_last(int64_t k0) const { return after(k0) >= K_; }
  bool starts_eight(int64_t k0) const { return k0 % eight() == 0; }
  bool ends_eight(int64_t k0) const { return after(k0) % eight() == 0 || is_last(k0); }
  bool is_of_first_eight(int64_t k0) const { return k0 < eight(); }
  bool is_one_eight() const { return K_ <= eight(); }

 private:
  int64_t eight() const { return kPieceBlocksAdded * most_depth_; }

  int64_t K_, most_depth_;
};

// Elements of a packed group: [steps][kFloat32Pieces][16 pairs][rows][2].
static constexpr int64_t piece_group_size(int64_t K, int64_t rows = kBfloat16Group) {
  return kFloat32Pieces * bfloat16_group_size(K, rows);
}

// Packs x [rows, K] of row stride x_stride into a group of group_rows rows, at most kBfloat16Group; what lies
// beyond is zero.
void pack_float32_group_amx(const float* x, int64_t x_stride, int64_t rows, int64_t K, uint16_t* packed,
                            int64_t group_rows = kBfloat16Group);

// The largest |row[k]|, NaN aside.
float largest_magnitude_amx(const float* row, int64_t K);

}  // namespace dtm_fast
