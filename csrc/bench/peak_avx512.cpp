#include <immintrin.h>

#include "peak_loops.h"

namespace dtm_fast::bench {

// 5 x 4 products of distinct registers, as the inner step of a matrix product. Growing sums stay finite:
// float32 stops growing at about 2^24 additions.
double fma_avx512(int64_t iterations, const float* seed) {
  __m512 a[5], b[4], acc[5][4];
#pragma GCC unroll 5
  for (int i = 0; i < 5; ++i) a[i] = _mm512_loadu_ps(seed + 16 * i);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) b[j] = _mm512_loadu_ps(seed + 80 + 16 * j);
#pragma GCC unroll 5
  for (int i = 0; i < 5; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_loadu_ps(seed + 160 + 16 * (4 * i + j));
  }
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 5
    for (int i = 0; i < 5; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_fmadd_ps(a[i], b[j], acc[i][j]);
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

uint64_t read_avx512(const void* memory, int64_t bytes) {
  const auto* p = static_cast<const char*>(memory);
  __m512i acc[8];
  for (auto& each : acc) each = _mm512_setzero_si512();
  for (int64_t at = 0; at < bytes; at += 512) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) acc[i] = _mm512_xor_si512(acc[i], _mm512_load_si512(p + at + 64 * i));
  }
#pragma GCC unroll 8
  for (int i = 1; i < 8; ++i) acc[0] = _mm512_xor_si512(acc[0], acc[i]);
  return static_cast<uint64_t>(_mm512_reduce_or_epi64(acc[0]));
}

}  // namespace dtm_fast::bench
