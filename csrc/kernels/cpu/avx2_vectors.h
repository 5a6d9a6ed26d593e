// Vectors of 8 lanes. Included only by files compiled for AVX2; everything is in an anonymous namespace, so
// that no copy can reach a baseline file.
#pragma once

#include <immintrin.h>

namespace dtm_fast {
namespace {

// In place: r[j] lane i = old r[i] lane j. First inside each block of 4 x 4, then between the blocks.
inline void transpose_8x8(__m256 r[8]) {
  for (int g = 0; g < 8; g += 4) {
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(r[g], r[g + 1]));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(r[g], r[g + 1]));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(r[g + 2], r[g + 3]));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(r[g + 2], r[g + 3]));
    r[g] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
    r[g + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
    r[g + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
    r[g + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
  }
  for (int c = 0; c < 4; ++c) {
    const __m256 first = r[c], second = r[4 + c];
    r[c] = _mm256_permute2f128_ps(first, second, 0x20);
    r[4 + c] = _mm256_permute2f128_ps(first, second, 0x31);
  }
}

}  // namespace
}  // namespace dtm_fast
