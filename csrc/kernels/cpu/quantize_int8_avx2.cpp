#include <immintrin.h>

#include <cstring>

#include "quantize_int8.h"

namespace dtm_fast {
namespace {

template <FloatType type>
__m256 load_8(const void* x, int64_t index) {
  if (type == FloatType::kFloat32) return _mm256_loadu_ps(static_cast<const float*>(x) + index);
  const __m128i bits =
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(x) + index));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// The last count < 8 elements, zeros behind them.
template <FloatType type>
__m256 load_tail(const void* x, int64_t index, int64_t count) {
  alignas(32) char copy[32] = {};
  std::memcpy(copy, static_cast<const char*>(x) + index * size_of(type),
              static_cast<size_t>(count * size_of(type)));
  return load_8<type>(copy, 0);
}

__m256i larger_magnitude(__m256i largest, __m256 x) {
  const __m256i bits = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
  return _mm256_max_epi32(largest, bits);
}

// Eight int8 in the low half. Values before rounding are at most absmax / scale, far inside int32: a denormal
// scale is rounded by at most a factor of 2, so cvtps_epi32 never overflows and the clamp comes after it.
__m128i quantize_8(__m256 x, __m256 divisor) {
  const __m256i limit = _mm256_set1_epi32(127);
  __m256i q = _mm256_cvtps_epi32(_mm256_div_ps(x, divisor));
  q = _mm256_max_epi32(_mm256_min_epi32(q, limit), _mm256_sub_epi32(_mm256_setzero_si256(), limit));
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  return _mm_packs_epi16(words, words);
}

template <FloatType type>
float quantize_row(const void* x, int64_t K, int8_t* qx) {
  // The bits of |x| order like integers, with infinity and the NaNs above every finite number.
  __m256i largest = _mm256_setzero_si256();
  int64_t k = 0;
  for (; k + 8 <= K; k += 8) largest = larger_magnitude(largest, load_8<type>(x, k));
  if (k < K) largest = larger_magnitude(largest, load_tail<type>(x, k, K - k));
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
  int32_t absmax_bits = 0;
  for (int32_t lane : lanes) absmax_bits = lane > absmax_bits ? lane : absmax_bits;
  if (absmax_bits >= 0x7f800000) {
    std::memset(qx, 0, static_cast<size_t>(K));
    return __builtin_nanf("");
  }
  float absmax;
  std::memcpy(&absmax, &absmax_bits, sizeof absmax);
  const float scale = absmax / 127.0f;
  if (scale == 0.0f) {
    std::memset(qx, 0, static_cast<size_t>(K));
    return 0.0f;
  }
  const __m256 divisor = _mm256_set1_ps(scale);
  for (k = 0; k + 8 <= K; k += 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(qx + k), quantize_8(load_8<type>(x, k), divisor));
  }
  if (k < K) {
    alignas(16) int8_t tail[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(tail), quantize_8(load_tail<type>(x, k, K - k), divisor));
    std::memcpy(qx + k, tail, static_cast<size_t>(K - k));
  }
  return scale;
}

}  // namespace

float quantize_int8_row_avx2(const void* x, FloatType x_type, int64_t K, int8_t* qx) {
  return x_type == FloatType::kFloat32 ? quantize_row<FloatType::kFloat32>(x, K, qx)
                                       : quantize_row<FloatType::kBfloat16>(x, K, qx);
}

}  // namespace dtm_fast
