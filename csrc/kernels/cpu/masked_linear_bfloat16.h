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
  const uint16_t* x;  // groups m0 / 16 and following, packed as in bfloat16_tiles.h; m0 is a multiple of 16
  float* sums;        // masked_linear_tile_sums(variants, rows, cols)
};

static constexpr int64_t masked_linear_tile_sums(int64_t variants, int64_t rows, int64_t cols) {
  return variants * ((rows + 15) / 16 * 16) * ((cols + 31) / 32 * 32);
}

void masked_linear_tile_amx(const MaskedLinear& args, const MaskedLinearTile& tile);

// The same for tiles of at most kFewRows rows, where reading the weight takes longer than multiplying.
constexpr int64_t kFewRows = 2 * kBfloat16Group;
void masked_linear_few_amx(const MaskedLinear& args, const MaskedLinearTile& tile);

}  // namespace dtm_fast
