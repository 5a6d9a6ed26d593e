#include "gemm_panel_avx512.h"

namespace dtm_fast {

void gemm_tile_avx512(const GemmTile& tile) {
  tile.type == FloatType::kFloat32 ? multiply_tile<FloatType::kFloat32, FloatLanes>(tile)
                                   : multiply_tile<FloatType::kBfloat16, FloatLanes>(tile);
}

}  // namespace dtm_fast
