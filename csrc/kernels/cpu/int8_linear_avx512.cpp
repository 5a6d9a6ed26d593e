#include <immintrin.h>

#include "int8_linear.h"

namespace dtm_fast {
namespace {

constexpr int64_t kStep = 32;  // int8 elements of K per vector, widened to int16

// Lane j of the result is the sum of all lanes of a_j.
__m128i sum_lanes(__m512i a0, __m512i a1, __m512i a2, __m512i a3) {
  const __m512i a01 = _mm512_add_epi32(_mm512_unpacklo_epi32(a0, a1), _mm512_unpackhi_epi32(a0, a1));
  const __m512i a23 = _mm512_add_epi32(_mm512_unpacklo_epi32(a2, a3), _mm512_unpackhi_epi32(a2, a3));
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi64(a01, a23), _mm512_unpackhi_epi64(a01, a23));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

__m512i load_widened(const int8_t* q, __mmask32 bytes) {
  return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(bytes, q));
}

// vpmaddubsw would multiply bytes directly, but saturates its int16 pair sums; int16 pairs of vpmaddwd never
// do (2 * 128 * 128 fits in int32).
template <int kRows, int kCols>
void dot_block(const int8_t* qx, int64_t qx_stride, const int8_t* qweight, int64_t qweight_stride, int64_t K,
               int32_t* acc, int64_t acc_stride) {
  __m512i sum[kRows][4] = {};
  for (int64_t k = 0; k < K; k += kStep) {
    const __mmask32 bytes = K - k >= kStep ? ~__mmask32{0} : (__mmask32{1} << (K - k)) - 1;
    __m512i x[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) x[i] = load_widened(qx + i * qx_stride + k, bytes);
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) {
      const __m512i w = load_widened(qweight + j * qweight_stride + k, bytes);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[i][j] = _mm512_add_epi32(sum[i][j], _mm512_madd_epi16(x[i], w));
    }
  }
  constexpr __mmask8 kLanes = (1u << kCols) - 1u;
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    _mm_mask_storeu_epi32(acc + i * acc_stride, kLanes,
                          sum_lanes(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
  }
}

template <int kCols>
void dot_columns(const int8_t* qx, int64_t qx_stride, int64_t rows, const int8_t* qweight,
                 int64_t qweight_stride, int64_t K, int32_t* acc, int64_t acc_stride) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    dot_block<4, kCols>(qx + i * qx_stride, qx_stride, qweight, qweight_stride, K, acc + i * acc_stride,
                        acc_stride);
  }
  for (; i < rows; ++i) {
    dot_block<1, kCols>(qx + i * qx_stride, qx_stride, qweight, qweight_stride, K, acc + i * acc_stride,
                        acc_stride);
  }
}

}  // namespace

void int8_dot_tile_avx512(const int8_t* qx, int64_t qx_stride, int64_t rows, const int8_t* qweight,
                          int64_t qweight_stride, int64_t cols, int64_t K, int32_t* acc, int64_t acc_stride) {
  int64_t j = 0;
  for (; j + 4 <= cols; j += 4) {
    dot_columns<4>(qx, qx_stride, rows, qweight + j * qweight_stride, qweight_stride, K, acc + j, acc_stride);
  }
  for (; j < cols; ++j) {
    dot_columns<1>(qx, qx_stride, rows, qweight + j * qweight_stride, qweight_stride, K, acc + j, acc_stride);
  }
}

}  // namespace dtm_fast
