// exp of 16 float32 <= 0. Only for files compiled for AVX-512.
#pragma once

#include <immintrin.h>

namespace dtm_fast {
namespace {

// exp(x) = 2^n * exp(r) with n = round(x / ln 2) and ln 2 in two parts, so that r loses no bits (Cody &
// Waite, "Software Manual for the Elementary Functions", 1980). |r| <= 0.3466, where the Taylor polynomial of
// degree 7 is off by 5e-9 of the value, a tenth of a float32 ulp. The error is below 2 ulp; results below
// 2^-126 become 0. The operations, and so the bits, are those of exp_avx2.h.
inline __m512 exp_nonpositive(__m512 x) {
  const __mmask16 not_tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.33654f), _CMP_GE_OQ);
  x = _mm512_maskz_mov_ps(not_tiny, x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040.0f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  const __m512i exponent =
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
  return _mm512_maskz_mul_ps(not_tiny, p, _mm512_castsi512_ps(exponent));
}

}  // namespace
}  // namespace dtm_fast
