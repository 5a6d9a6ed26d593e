#include <immintrin.h>

#include "exp_avx2.h"
#include "token_divergence.h"

namespace dtm_fast {
namespace {

// The first position whose logit is `wanted`, or the first NaN if wanted is a NaN. It must exist.
int64_t first_position(const float* logits, float wanted) {
  const __m256 value = _mm256_set1_ps(wanted);
  const bool nan = wanted != wanted;
  for (int64_t j = 0;; j += 8) {
    const __m256 x = _mm256_loadu_ps(logits + j);
    const __m256 hits = nan ? _mm256_cmp_ps(x, x, _CMP_UNORD_Q) : _mm256_cmp_ps(x, value, _CMP_EQ_OQ);
    const int bits = _mm256_movemask_ps(hits);
    if (bits != 0) return j + __builtin_ctz(static_cast<unsigned>(bits));
  }
}

float max_8(__m256 lanes) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// Adds the upper half of the lanes to the lower until one is left; the AVX-512 twin adds in the same order.
float sum_16(__m256 lower, __m256 upper) {
  const __m256 eight = _mm256_add_ps(lower, upper);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace

LogitSummary summarize_logits_avx2(const float* logits, int64_t count) {
  __m256 largest = _mm256_loadu_ps(logits);
  __m256 nan_lanes = _mm256_setzero_ps();
  for (int64_t j = 0; j < count; j += 8) {
    const __m256 x = _mm256_loadu_ps(logits + j);
    largest = _mm256_max_ps(largest, x);
    nan_lanes = _mm256_or_ps(nan_lanes, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  }
  LogitSummary summary;
  summary.max = _mm256_movemask_ps(nan_lanes) != 0 ? __builtin_nanf("") : max_8(largest);
  summary.argmax = first_position(logits, summary.max);
  const __m256 shift = _mm256_set1_ps(summary.max);
  // Sixteen lanes, as in the AVX-512 twin, so that both sum in the same order.
  __m256 lower = _mm256_setzero_ps();
  __m256 upper = _mm256_setzero_ps();
  for (int64_t j = 0; j < count; j += 16) {
    lower = _mm256_add_ps(lower, exp_nonpositive(_mm256_sub_ps(_mm256_loadu_ps(logits + j), shift)));
    upper = _mm256_add_ps(upper, exp_nonpositive(_mm256_sub_ps(_mm256_loadu_ps(logits + j + 8), shift)));
  }
  summary.sum_exp = sum_16(lower, upper);
  return summary;
}

void round_logits_avx2(float* logits, int64_t count) {
  const __m256i upper_half = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const __m256 quiet_nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  for (int64_t j = 0; j < count; j += 8) {
    const __m256 x = _mm256_loadu_ps(logits + j);
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 rounded = _mm256_castsi256_ps(_mm256_and_si256(nearest, upper_half));
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    _mm256_storeu_ps(logits + j, _mm256_blendv_ps(rounded, quiet_nan, nan));
  }
}

}  // namespace dtm_fast
