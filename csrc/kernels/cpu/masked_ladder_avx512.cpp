#include <immintrin.h>

#include "avx512_vectors.h"
#include "masked_ladder.h"
#include "sparse_linear.h"

namespace dtm_fast {

void stream_y_avx512(const float* c, int64_t rows, int64_t tokens, const float* bias, float* y,
                     int64_t y_stride) {
  for (int64_t m = 0; m < tokens; m += 16) {
    for (int64_t n = 0; n < rows; n += 16) {
      const __m512 added = bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(bias + n);
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i) r[i] = _mm512_load_si512(c + (n + i) * kSparseTokens + m);
      transpose_16x16(r);
      for (int64_t i = 0; i < 16 && m + i < tokens; ++i) {
        __m512 value = _mm512_castsi512_ps(r[i]);
        if (bias != nullptr) value = _mm512_add_ps(value, added);
        _mm512_stream_ps(y + (m + i) * y_stride + n, value);
      }
    }
  }
  _mm_sfence();
}

}  // namespace dtm_fast
