#include "gemm_tile.h"

namespace dtm_fast {

GemmTileKernel* gemm_tile_kernel(CpuIsa isa) {
  require_cpu_isa(isa);
  return isa >= CpuIsa::kAvx512 ? gemm_tile_avx512 : gemm_tile_avx2;
}

}  // namespace dtm_fast
