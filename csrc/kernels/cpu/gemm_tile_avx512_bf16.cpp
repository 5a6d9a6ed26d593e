#include "gemm_panel_avx512.h"
#include "pair_lanes_avx512_bf16.h"

namespace dtm_fast {

void gemm_tile_avx512_bf16(const GemmTile& tile) { multiply_tile<FloatType::kBfloat16, PairLanes>(tile); }

}  // namespace dtm_fast
