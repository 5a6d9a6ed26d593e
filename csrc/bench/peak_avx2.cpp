#include <immintrin.h>

#include "peak_loops.h"

namespace dtm_fast::bench {

// 12 accumulators: two units of latency 4 or 5 need 10. acc * a + b with a < 1 converges, so it stays finite.
double fma_avx2(int64_t iterations, const float* seed) {
  const __m256 a = _mm256_loadu_ps(seed), b = _mm256_loadu_ps(seed + 8);
  __m256 acc[12];
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) acc[i] = _mm256_loadu_ps(seed + 16 + 8 * i);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = _mm256_fmadd_ps(acc[i], a, b);
  }
  __m256 sum = acc[0];
#pragma GCC unroll 12
  for (int i = 1; i < 12; ++i) sum = _mm256_add_ps(sum, acc[i]);
  float lanes[8];
  _mm256_storeu_ps(lanes, sum);
  double total = 0;
  for (float lane : lanes) total += lane;
  return total;
}

uint64_t read_avx2(const void* memory, int64_t bytes) {
  const auto* p = static_cast<const char*>(memory);
  __m256i acc[8];
  for (auto& each : acc) each = _mm256_setzero_si256();
  for (int64_t at = 0; at < bytes; at += 512) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const auto* line = reinterpret_cast<const __m256i*>(p + at + 32 * i);
      acc[i % 8] = _mm256_xor_si256(acc[i % 8], _mm256_load_si256(line));
    }
  }
#pragma GCC unroll 8
  for (int i = 1; i < 8; ++i) acc[0] = _mm256_xor_si256(acc[0], acc[i]);
  uint64_t lanes[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), acc[0]);
  return lanes[0] ^ lanes[1] ^ lanes[2] ^ lanes[3];
}

}  // namespace dtm_fast::bench
