// masked_linear in float32 on AMX tiles. The order of the sum is that of float32_pieces.h.
#pragma once

#include "float32_pieces.h"
#include "masked_linear.h"
#include "row_marks.h"

namespace dtm_fast {

// For CpuIsa::kAmx and FloatType::kFloat32. Adds to marks [M]: what is marked must be computed in another
// way.
void masked_linear_float32(const MaskedLinear& args, int num_threads, RowMark* marks);

// y[v0 : v0 + variants, m0 : m0 + rows, n0 : n0 + cols]
struct Float32Tile {
  int64_t v0, m0, n0;
  int64_t variants, rows, cols;
  RowMark* marks;  // of row m0 and following: gets kNotFinite
};

// Tiles of many rows pack their block of x themselves.
struct Float32Scratch {
  uint16_t* block_of_x;  // piece_group_size(kLongestPieceBlock) for each 16 rows
  float* sums;           // float32_tile_sums(variants, rows, cols)
  float* of_eight;       // as many; nullptr if K is one eight of blocks
};

static constexpr int64_t float32_tile_sums(int64_t variants, int64_t rows, int64_t cols) {
  return variants * ((rows + 15) / 16 * 16) * ((cols + 31) / 32 * 32);
}

void masked_linear_float32_amx(const MaskedLinear& args, const Float32Tile& tile,
                               const Float32Scratch& scratch);

// The same for at most kFewFloat32Rows rows, where reading the weight takes longer than multiplying.
// packed_x: groups of rows_of_groups(M) rows.
constexpr int64_t kFewFloat32Rows = 2 * kBfloat16Group;
void masked_linear_few_float32_amx(const MaskedLinear& args, const Float32Tile& tile,
                                   const uint16_t* packed_x);

// The same for one group of rows and several masks, where multiplying takes longer than reading.
void masked_linear_few_masks_float32_amx(const MaskedLinear& args, const Float32Tile& tile,
                                         const uint16_t* packed_x);

}  // namespace dtm_fast
