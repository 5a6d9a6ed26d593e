#include <immintrin.h>

#include "peak_loops.h"

namespace dtm_fast::bench {

// The bytes of random floats serve as random bytes. vpdpbusd wraps around, which int32 vectors may.
double dot_int8_avx512_vnni(int64_t iterations, const float* seed) {
  __m512i a[5], b[4], acc[5][4];
#pragma GCC unroll 5
  for (int i = 0; i < 5; ++i) a[i] = _mm512_loadu_si512(seed + 16 * i);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) b[j] = _mm512_loadu_si512(seed + 80 + 16 * j);
#pragma GCC unroll 5
  for (int i = 0; i < 5; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_loadu_si512(seed + 160 + 16 * (4 * i + j));
  }
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 5
    for (int i = 0; i < 5; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], a[i], b[j]);
    }
  }
  double total = 0;
#pragma GCC unroll 5
  for (int i = 0; i < 5; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      total += _mm512_reduce_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(acc[i][j])));
    }
  }
  return total;
}

}  // namespace dtm_fast::bench
