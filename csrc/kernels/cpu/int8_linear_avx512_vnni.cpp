#include <immintrin.h>

#include "int8_linear.h"

namespace dtm_fast {
namespace {

// Weight rows to fetch ahead: one read after the other, memory would be waited for at every new page.
constexpr int64_t kAhead = 8;
constexpr int64_t kStep = 64;  // int8 elements of K per vector

__mmask64 first_bytes(int64_t count) { return count >= kStep ? ~__mmask64{0} : (__mmask64{1} << count) - 1; }

// Lane j of the result is the sum of all lanes of a_j.
__m128i sum_lanes(__m512i a0, __m512i a1, __m512i a2, __m512i a3) {
  const __m512i a01 = _mm512_add_epi32(_mm512_unpacklo_epi32(a0, a1), _mm512_unpackhi_epi32(a0, a1));
  const __m512i a23 = _mm512_add_epi32(_mm512_unpacklo_epi32(a2, a3), _mm512_unpackhi_epi32(a2, a3));
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi64(a01, a23), _mm512_unpackhi_epi64(a01, a23));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// 128 * sum_k qx[k]
int32_t offset_part(const int8_t* qx, int64_t K) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += kStep) {
    const __m512i x = _mm512_maskz_loadu_epi8(first_bytes(K - k), qx + k);
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), x);
  }
  return _mm512_reduce_add_epi32(sum) * 128;
}

// vpdpbusd multiplies unsigned by signed bytes, so the weight is offset by 128 and 128 * sum_k qx[i, k] is
// taken off the result (Intel 64 and IA-32 Architectures Optimization Reference Manual, "Vector Neural
// Network Instructions"). Bytes beyond K are 0 in x, so that the 128 they have in the weight does not count.
//
// The loops over the block are unrolled by pragma: left to itself, GCC 12 unrolls them too late to keep the
// sums in registers, and stores all of them in every step.
template <int kRows, int kCols>
void dot_block(const int8_t* qx, const int8_t* qweight, int64_t qweight_stride, int64_t K,
               const int32_t* token_part, int32_t* acc, int64_t acc_stride) {
  const __m512i kOffset = _mm512_set1_epi8(-128);
  __m512i sum[kRows][4] = {};
  for (int64_t k = 0; k < K; k += kStep) {
    const __mmask64 bytes = first_bytes(K - k);
    __m512i x[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) x[i] = _mm512_maskz_loadu_epi8(bytes, qx + i * K + k);
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) {
      const int8_t* row = qweight + j * qweight_stride + k;
      _mm_prefetch(reinterpret_cast<const char*>(row + kAhead * qweight_stride), _MM_HINT_T0);
      const __m512i w = _mm512_xor_si512(_mm512_maskz_loadu_epi8(bytes, row), kOffset);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], w, x[i]);
    }
  }
  constexpr __mmask8 kLanes = (1u << kCols) - 1u;
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    const __m128i offset_sum = sum_lanes(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
    _mm_mask_storeu_epi32(acc + i * acc_stride, kLanes,
                          _mm_sub_epi32(offset_sum, _mm_set1_epi32(token_part[i])));
  }
}

// For four tokens or fewer, whose parts are in token_part.
template <int kRows>
void dot_rows(const int8_t* qx, const int8_t* qweight, int64_t qweight_stride, int64_t cols, int64_t K,
              int32_t* acc, int64_t acc_stride) {
  int32_t token_part[kRows];
  for (int i = 0; i < kRows; ++i) token_part[i] = offset_part(qx + i * K, K);
  int64_t j = 0;
  for (; j + 4 <= cols; j += 4) {
    dot_block<kRows, 4>(qx, qweight + j * qweight_stride, qweight_stride, K, token_part, acc + j, acc_stride);
  }
  for (; j < cols; ++j) {
    dot_block<kRows, 1>(qx, qweight + j * qweight_stride, qweight_stride, K, token_part, acc + j, acc_stride);
  }
}

}  // namespace

void int8_dot_tile_avx512_vnni(const int8_t* qx, int64_t rows, const int8_t* qweight, int64_t qweight_stride,
                               int64_t cols, int64_t K, int32_t* acc, int64_t acc_stride) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    dot_rows<4>(qx + i * K, qweight, qweight_stride, cols, K, acc + i * acc_stride, acc_stride);
  }
  for (; i < rows; ++i) {
    dot_rows<1>(qx + i * K, qweight, qweight_stride, cols, K, acc + i * acc_stride, acc_stride);
  }
}

}  // namespace dtm_fast
