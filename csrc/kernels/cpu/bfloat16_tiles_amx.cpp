#include "avx512_vectors.h"
#include "bfloat16_tiles.h"

namespace dtm_fast {

void pack_bfloat16_group_amx(const uint16_t* x, int64_t x_stride, int64_t rows, int64_t K, uint16_t* packed,
                             int64_t group_rows) {
  const __mmask16 lanes = first_lanes(group_rows);
  if (group_rows == 1) {  // as it is
    for (int64_t k = 0; k < K; k += kBfloat16Step) {
      _mm512_storeu_si512(packed + k, _mm512_maskz_loadu_epi16(first_words(K - k), x + k));
    }
    return;
  }
  for (int64_t k = 0; k < K; k += kBfloat16Step) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) {
      r[i] = _mm512_setzero_si512();
      if (i < rows) r[i] = _mm512_maskz_loadu_epi16(first_words(K - k), x + i * x_stride + k);
    }
    transpose_16x16(r);
    uint16_t* step = packed + k * group_rows;
#pragma GCC unroll 16
    for (int64_t pair = 0; pair < 16; ++pair) {
      _mm512_mask_storeu_epi32(step + pair * 2 * group_rows, lanes, r[pair]);
    }
  }
}

}  // namespace dtm_fast
