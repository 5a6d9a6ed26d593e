// exp of 16 float32 <= 0 where only a sum that holds exp(0) is wanted of it. Only for files compiled for AMX.
#pragma once

#include <immintrin.h>

namespace dtm_fast {
namespace {

// exp(x) = 2^n * 2^f, n = floor(x / ln 2), 0 <= f < 1: VREDUCEPS gives f, VSCALEFPS multiplies by 2^n. 2^f is
// the polynomial of degree 5 that is 1 at 0 and has the least relative error, 9.4e-8. Below 2^-126 the result
// is 2^-126, which beside exp(0) does not count, and which no denormal slows down; infinity and NaN remain.
inline __m512 exp_term(__m512 x) {
  __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  t = _mm512_max_ps(_mm512_set1_ps(-126.0f), t);
  const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0x1.e974fep-10f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.277854p-7f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c91ce6p-5f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebdb56p-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e4bap-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, t);
}

}  // namespace
}  // namespace dtm_fast
