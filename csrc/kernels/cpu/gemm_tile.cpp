#include "gemm_tile.h"

namespace dtm_fast {

GemmTileKernel* gemm_tile_kernel(CpuIsa isa, FloatType type) {
  require_cpu_isa(isa);
  if (isa >= CpuIsa::kAvx512Bf16 && type == FloatType::kBfloat16) return gemm_tile_avx512_bf16;
  return isa >= CpuIsa::kAvx512 ? gemm_tile_avx512 : gemm_tile_avx2;
}

}  // namespace dtm_fast
