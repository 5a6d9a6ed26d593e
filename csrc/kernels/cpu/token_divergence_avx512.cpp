#include <immintrin.h>

#include "avx512_vectors.h"
#include "exp_avx512.h"
#include "token_divergence.h"

namespace dtm_fast {
namespace {

// The first position whose logit is `wanted`, or the first NaN if wanted is a NaN. It must exist.
int64_t first_position(const float* logits, float wanted) {
  const __m512 value = _mm512_set1_ps(wanted);
  const bool nan = wanted != wanted;
  for (int64_t j = 0;; j += 16) {
    const __m512 x = _mm512_loadu_ps(logits + j);
    const __mmask16 hits =
        nan ? _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) : _mm512_cmp_ps_mask(x, value, _CMP_EQ_OQ);
    if (hits != 0) return j + __builtin_ctz(hits);
  }
}

// Adds the upper half of the lanes to the lower until one is left; the AVX2 twin adds in the same order.
float sum_16(__m512 lanes) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace

LogitSummary summarize_logits_avx512(const float* logits, int64_t count) {
  __m512 largest = _mm512_loadu_ps(logits);
  __mmask16 nan_lanes = 0;
  for (int64_t j = 0; j < count; j += 16) {
    const __m512 x = _mm512_loadu_ps(logits + j);
    largest = _mm512_max_ps(largest, x);
    nan_lanes = static_cast<__mmask16>(nan_lanes | _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q));
  }
  LogitSummary summary;
  summary.max = nan_lanes != 0 ? __builtin_nanf("") : _mm512_reduce_max_ps(largest);
  summary.argmax = first_position(logits, summary.max);
  const __m512 shift = _mm512_set1_ps(summary.max);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < count; j += 16) {
    sum = _mm512_add_ps(sum, exp_nonpositive(_mm512_sub_ps(_mm512_loadu_ps(logits + j), shift)));
  }
  summary.sum_exp = sum_16(sum);
  return summary;
}

void round_logits_avx512(float* logits, int64_t count) {
  for (int64_t j = 0; j < count; j += 16) {
    const __m512i bits = bfloat16_lanes(_mm512_loadu_ps(logits + j));
    _mm512_storeu_ps(logits + j, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
  }
}

}  // namespace dtm_fast
