#include "masked_few_tokens_avx512.h"

namespace dtm_fast {

void masked_few_tokens_avx512(const GemmTile& tile, const float* x, Fetch fetch) {
  tile.type == FloatType::kFloat32 ? multiply_few<FloatType::kFloat32, FloatLanes>(tile, x, fetch)
                                   : multiply_few<FloatType::kBfloat16, FloatLanes>(tile, x, fetch);
}

void few_tokens_x_avx512(FloatType type, const void* x, int64_t x_stride, int64_t rows, int64_t K,
                         float* out) {
  type == FloatType::kFloat32 ? pack_few<FloatType::kFloat32, FloatLanes>(x, x_stride, rows, K, out)
                              : pack_few<FloatType::kBfloat16, FloatLanes>(x, x_stride, rows, K, out);
}

}  // namespace dtm_fast
