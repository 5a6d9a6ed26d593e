// What the token tiles of AVX-512 VNNI and AMX share. Included only by files compiled for at least AVX-512
// VNNI; everything is in an anonymous namespace, so that no copy can reach a file of a lower instruction set.
#pragma once

#include <immintrin.h>

#include "avx512_vectors.h"
#include "int8_linear.h"

namespace dtm_fast {
namespace {

constexpr int64_t kVectorBytes = 64;
constexpr int64_t kLanes = kInt8TokenBlock;
constexpr int kCols = 16;  // weight rows that are finished together

// y[m0 : m0 + rows, n0 : n0 + cols] from the sums acc [cols, rows], less offset[cols] (nullptr: nothing);
// rows <= 16, cols <= 16; scale_x belongs to row m0.
template <FloatType type>
void store_block(const Int8Linear& args, const float* scale_x, int64_t m0, int64_t rows, int64_t n0,
                 int64_t cols, const int32_t* acc, int64_t acc_stride, const int32_t* offset) {
  const __m512 scales = _mm512_maskz_loadu_ps(first_lanes(rows), scale_x);
  __m512i r[16];
#pragma GCC unroll 16
  for (int64_t j = 0; j < kCols; ++j) {
    r[j] = _mm512_setzero_si512();
    if (j >= cols) continue;
    __m512i sum = _mm512_loadu_si512(acc + j * acc_stride);
    if (offset != nullptr) sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(offset[j]));
    __m512 value = _mm512_cvtepi32_ps(sum);
    value = _mm512_mul_ps(value, _mm512_mul_ps(scales, _mm512_set1_ps(args.scale_w[n0 + j])));
    if (args.bias != nullptr) value = _mm512_add_ps(value, _mm512_set1_ps(args.bias[n0 + j]));
    r[j] = _mm512_castps_si512(value);
  }
  transpose_16x16(r);
  const __mmask16 lanes = first_lanes(cols);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t first = (m0 + i) * args.N + n0;
    if (type == FloatType::kFloat32) {
      _mm512_mask_storeu_ps(static_cast<float*>(args.y) + first, lanes, _mm512_castsi512_ps(r[i]));
    } else {
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(args.y) + first, lanes,
                               _mm512_cvtepi32_epi16(bfloat16_lanes(_mm512_castsi512_ps(r[i]))));
    }
  }
}

}  // namespace
}  // namespace dtm_fast
