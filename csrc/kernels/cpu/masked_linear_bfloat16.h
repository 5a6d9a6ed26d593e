// masked_linear in bfloat16 on AMX tiles. The order of the sum is that of bfloat16_tiles.h.
#pragma once

#include "bfloat16_tiles.h"
#include "masked_linear.h"

namespace dtm_fast {

// For CpuIsa::kAmx and FloatType::kBfloat16.
void masked_linear_bfloat16(const MaskedLinear& args, int num_threads);

// y[v0 : v0 + variants, m0 : m0 + rows, n0 : n0 + cols]
struct MaskedLinearTile {
  int64_t v0, m0, n0;
  int64_t variants, rows, cols;
  const uint16_t* x;   // groups m0 / 16 and following, packed as in bfloat16_tiles.h; m0 is a multiple of 16
  int64_t group_rows;  // rows_of_groups of all of x
  float* sums;         // masked_linear_tile_sums(variants, rows, cols)
};

static constexpr int64_t masked_linear_tile_sums(int64_t variants, int64_t rows, int64_t cols) {
  return variants * ((rows + 15) / 16 * 16) * ((cols + 31) / 32 * 32);
}

void masked_linear_tile_amx(const MaskedLinear& args, const MaskedLinearTile& tile);

// The same for tiles of at most kFewRows rows, where reading the weight takes longer than multiplying.
constexpr int64_t kFewRows = 2 * kBfloat16Group;
void masked_linear_few_amx(const MaskedLinear& args, const MaskedLinearTile& tile);

// The same for all of x in one group and several masks, where multiplying takes longer than reading.
void masked_linear_few_masks_amx(const MaskedLinear& args, const MaskedLinearTile& tile);

// So many rows that packing the masked weight is worth it, see row_tiles.h.

// Packs weight rows 32 * block and following under mask v: RowTiles::block_bytes() of the packed weight.
void masked_pack_weight_amx(const MaskedLinear& args, int64_t v, int64_t block, char* packed);

// What a task of `rows` rows needs, on lines of cache.
struct MaskedRowScratch {
  char* rows;   // RowTiles::block_bytes() for each 32 rows
  float* sums;  // kBlockSums for each 32 rows
};

// y[v, m0 : m0 + rows, :]
void masked_linear_rows_amx(const MaskedLinear& args, int64_t v, const char* packed_weight, int64_t m0,
                            int64_t rows, const MaskedRowScratch& scratch);

}  // namespace dtm_fast
