// exp of 8 float32 <= 0. Only for files compiled for AVX2.
#pragma once

#include <immintrin.h>

namespace dtm_fast {
namespace {

// exp(x) = 2^n * exp(r) with n = round(x / ln 2) and ln 2 in two parts, so that r loses no bits (Cody &
// Waite, "Software Manual for the Elementary Functions", 1980). |r| <= 0.3466, where the Taylor polynomial of
// degree 7 is off by 5e-9 of the value, a tenth of a float32 ulp. The error is below 2 ulp; results below
// 2^-126 become 0. The operations, and so the bits, are those of exp_avx512.h.
inline __m256 exp_nonpositive(__m256 x) {
  const __m256 not_tiny = _mm256_cmp_ps(x, _mm256_set1_ps(-87.33654f), _CMP_GE_OQ);
  x = _mm256_and_ps(not_tiny, x);
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.0f / 5040.0f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 720.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  const __m256i exponent =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_and_ps(not_tiny, _mm256_mul_ps(p, _mm256_castsi256_ps(exponent)));
}

}  // namespace
}  // namespace dtm_fast
