// Products of bfloat16 matrices on AMX tiles: the order of their sums, and how x is packed for them. What
// masked_linear and token_divergence share at this level.
//
// TDPBF16PS multiplies 16 weight rows by 16 rows of x, 32 of K at a time (Intel SDM vol. 2). For one weight
// row and one row of x, a step of 32 adds to their float32 sum
//
//   even = fma(x[30], w[30], ... fma(x[2], w[2], fma(x[0], w[0], 0)))
//   odd  = fma(x[31], w[31], ... fma(x[3], w[3], fma(x[1], w[1], 0)))
//   sum  = sum + (even + odd)
//
// each operation rounded to nearest even, denormal operands and results taken as zero. The steps follow each
// other in the order of K, from zero; the last one is filled up with zeros. Neither the number of rows nor
// any cutting into blocks enters, so an element depends on nothing but its row of x and its weight row, to
// the last bit. The order is another one than that of gemm_tile.h.
#pragma once

#include <cstdint>

namespace dtm_fast {

// Rows of x that are packed together, and the k of a step.
constexpr int64_t kBfloat16Group = 16;
constexpr int64_t kBfloat16Step = 32;

// Elements of a packed group: [ceil(K / 32) steps][16 pairs of neighbours in K][rows][2].
static constexpr int64_t bfloat16_group_size(int64_t K, int64_t rows = kBfloat16Group) {
  return (K + kBfloat16Step - 1) / kBfloat16Step * kBfloat16Step * rows;
}

// The rows of every group where M rows of x are packed for a kernel that reads them again and again while the
// weight passes by: one group of a few rows then stays in the first-level cache.
static constexpr int64_t rows_of_groups(int64_t M) { return M < kBfloat16Group ? M : kBfloat16Group; }

// The depth of all blocks of K but the last: as few blocks as possible, as even as steps allow.
static constexpr int64_t bfloat16_block_depth(int64_t K, int64_t longest) {
  const int64_t blocks = K <= longest ? 1 : (K + longest - 1) / longest;
  return ((K + blocks - 1) / blocks + kBfloat16Step - 1) / kBfloat16Step * kBfloat16Step;
}

// Packs x [rows, K] of row stride x_stride into a group of group_rows rows, at most kBfloat16Group; what lies
// beyond is zero.
void pack_bfloat16_group_amx(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t K, uint16_t* packed,
                             int64_t group_rows = kBfloat16Group);

}  // namespace dtm_fast
