#include <immintrin.h>

#include <cstring>

#include "int8_linear.h"

namespace dtm_fast {
namespace {

constexpr int64_t kStep = 16;  // int8 elements of K per vector, widened to int16

__m256i load_widened(const int8_t* q) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
}

// The last count < 16 elements, zeros behind them.
__m256i load_widened_tail(const int8_t* q, int64_t count) {
  alignas(16) int8_t copy[kStep] = {};
  std::memcpy(copy, q, static_cast<size_t>(count));
  return load_widened(copy);
}

// Lane j of the result is the sum of all lanes of a_j.
__m128i sum_lanes(__m256i a0, __m256i a1, __m256i a2, __m256i a3) {
  const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(a0, a1), _mm256_hadd_epi32(a2, a3));
  return _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}

// vpmaddubsw would multiply bytes directly, but saturates its int16 pair sums; int16 pairs of vpmaddwd never
// do (2 * 128 * 128 fits in int32).
template <int kRows, int kCols>
void dot_block(const int8_t* qx, int64_t qx_stride, const int8_t* qweight, int64_t qweight_stride, int64_t K,
               int32_t* acc, int64_t acc_stride) {
  __m256i sum[kRows][4] = {};
  int64_t k = 0;
  for (; k + kStep <= K; k += kStep) {
    __m256i x[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) x[i] = load_widened(qx + i * qx_stride + k);
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) {
      const __m256i w = load_widened(qweight + j * qweight_stride + k);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[i][j] = _mm256_add_epi32(sum[i][j], _mm256_madd_epi16(x[i], w));
    }
  }
  if (k < K) {
    __m256i x[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) x[i] = load_widened_tail(qx + i * qx_stride + k, K - k);
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) {
      const __m256i w = load_widened_tail(qweight + j * qweight_stride + k, K - k);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[i][j] = _mm256_add_epi32(sum[i][j], _mm256_madd_epi16(x[i], w));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    alignas(16) int32_t lanes[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(lanes), sum_lanes(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
    std::memcpy(acc + i * acc_stride, lanes, kCols * sizeof(int32_t));
  }
}

template <int kCols>
void dot_columns(const int8_t* qx, int64_t qx_stride, int64_t rows, const int8_t* qweight,
                 int64_t qweight_stride, int64_t K, int32_t* acc, int64_t acc_stride) {
  int64_t i = 0;
  for (; i + 2 <= rows; i += 2) {
    dot_block<2, kCols>(qx + i * qx_stride, qx_stride, qweight, qweight_stride, K, acc + i * acc_stride,
                        acc_stride);
  }
  if (i < rows)
    dot_block<1, kCols>(qx + i * qx_stride, qx_stride, qweight, qweight_stride, K, acc + i * acc_stride,
                        acc_stride);
}

}  // namespace

void int8_dot_tile_avx2(const int8_t* qx, int64_t qx_stride, int64_t rows, const int8_t* qweight,
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
