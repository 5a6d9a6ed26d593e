#include "masked_few_tokens_avx512.h"
#include "pair_lanes_avx512_bf16.h"

namespace dtm_fast {

void masked_few_tokens_avx512_bf16(const GemmTile& tile, const float* x, Fetch fetch) {
  multiply_few<FloatType::kBfloat16, PairLanes>(tile, x, fetch);
}

void few_tokens_x_avx512_bf16(FloatType, const void* x, int64_t x_stride, int64_t rows, int64_t K,
                              float* out) {
  pack_few<FloatType::kBfloat16, PairLanes>(x, x_stride, rows, K, out);
}

}  // namespace dtm_fast
