// Storing the sums of bfloat16_panel.h as results of masked_linear. Included only by files compiled for AMX;
// everything is in an anonymous namespace, so that no copy can reach a file of a lower instruction set.
#pragma once

#include "avx512_vectors.h"
#include "masked_linear.h"

namespace dtm_fast {
namespace {

// y[v, m : m + rows, n : n + cols] from the sums [32, 16] of a panel and a group; rows <= 16, cols <= 32.
inline void store_block(const MaskedLinear& args, int64_t v, int64_t m, int64_t rows, int64_t n, int64_t cols,
                        const float* sums) {
  // Two columns of y share the 32 bits of a lane, so that one transposition gives whole rows of 32.
  __m512i r[16];
#pragma GCC unroll 16
  for (int64_t pair = 0; pair < 16; ++pair) {
    __m512 low = _mm512_loadu_ps(sums + 2 * pair * 16);
    __m512 high = _mm512_loadu_ps(sums + (2 * pair + 1) * 16);
    if (args.bias != nullptr) {
      if (2 * pair < cols) low = _mm512_add_ps(low, _mm512_set1_ps(args.bias[n + 2 * pair]));
      if (2 * pair + 1 < cols) high = _mm512_add_ps(high, _mm512_set1_ps(args.bias[n + 2 * pair + 1]));
    }
    r[pair] = _mm512_or_si512(bfloat16_lanes(low), _mm512_slli_epi32(bfloat16_lanes(high), 16));
  }
  transpose_16x16(r);
  uint16_t* y = static_cast<uint16_t*>(args.y) + (v * args.M + m) * args.N + n;
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) {
    if (i < rows) _mm512_mask_storeu_epi16(y + i * args.N, first_words(cols), r[i]);
  }
}

}  // namespace
}  // namespace dtm_fast
