#include <immintrin.h>

#include "peak_loops.h"

namespace dtm_fast::bench {

double dot_bf16_avx512_bf16(int64_t iterations, const float* seed) {
  __m512bh a[5], b[4];
  __m512 acc[5][4];
#pragma GCC unroll 5
  for (int i = 0; i < 5; ++i) {
    a[i] = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(seed + 16 * i), _mm512_loadu_ps(seed + 300 + 16 * i));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    b[j] = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(seed + 80 + 16 * j), _mm512_loadu_ps(seed + 400 + 16 * j));
  }
#pragma GCC unroll 5
  for (int i = 0; i < 5; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_loadu_ps(seed + 500 + 16 * (4 * i + j));
  }
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 5
    for (int i = 0; i < 5; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], a[i], b[j]);
    }
  }
  double total = 0;
#pragma GCC unroll 5
  for (int i = 0; i < 5; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) total += _mm512_reduce_add_ps(acc[i][j]);
  }
  return total;
}

}  // namespace dtm_fast::bench
